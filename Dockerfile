# The image of flanneld: our programs, Python, nft and iptables, and nothing else. deploy/image/README.md tells more.
#
#   docker build -t flanneld .             (podman and buildah: --format docker, or they drop the health check)

# Any Debian from 12 on; its packages become the image, file by file.
ARG BASE=docker.io/library/debian:12-slim

FROM ${BASE} AS build
# Where pip gets the locked packages; for builds behind a mirror or a proxy with a certificate of its own.
ARG PIP_INDEX_URL
ARG PIP_CERT
# The time of all files, in seconds since 1970; the same sources and packages then give the same files.
ARG SOURCE_DATE_EPOCH=0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1

# The versions of Debian's packages are those of the day, with their security fixes; the bill of materials records them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends binutils ca-certificates iptables nftables python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /build
COPY deploy/image/build.lock deploy/image/requirements.lock deploy/image/
RUN python3 -m venv /venv \
    && /venv/bin/pip install --require-hashes --only-binary :all: -r deploy/image/build.lock \
    && /venv/bin/pip install --require-hashes --only-binary :all: -r deploy/image/requirements.lock \
        --no-compile --target /root/image/opt/flanneld

COPY . .
RUN /venv/bin/pip install --no-deps --no-build-isolation --no-index --no-compile --target /root/image/opt/flanneld . \
    && python3 deploy/image/program.py /root/image/opt/bin \
    && python3 deploy/image/rootfs.py /root/image \
    && python3 deploy/image/sbom.py /root/image

FROM scratch
COPY --from=build /root/image /

ARG VERSION
ARG REVISION
ARG CREATED
ARG BASE
LABEL org.opencontainers.image.title="flanneld" \
      org.opencontainers.image.description="Flannel-compatible overlay network daemon that repairs and explains itself" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}"

ENV PATH=/opt/bin:/usr/sbin:/usr/bin
# Root, but with NET_ADMIN and NET_RAW alone: Kubernetes gives capabilities to no other user. Where the runtime does
# (podman), --user flanneld works; see the README.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["/opt/bin/flannelctl", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/bin/flanneld"]

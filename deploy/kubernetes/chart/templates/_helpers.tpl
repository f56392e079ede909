{{- define "flannel.selectorLabels" -}}
app: flannel
k8s-app: flannel
{{- end -}}

{{- define "flannel.labels" -}}
{{ include "flannel.selectorLabels" . }}
tier: node
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.global.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* metadata that every object has: labels and annotations common to all */}}
{{- define "flannel.metadata" -}}
labels:
  {{- include "flannel.labels" . | nindent 2 }}
{{- with .Values.global.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "flannel.image" -}}
{{ .Values.flannel.image.repository }}:{{ .Values.flannel.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* "true" where leases are in etcd, "" where they are in Kubernetes */}}
{{- define "flannel.inEtcd" -}}
{{ if .Values.etcd.endpoints }}true{{ end }}
{{- end -}}

{{/* "true" where the daemon writes the CNI configuration */}}
{{- define "flannel.writesCni" -}}
{{ if not (or .Values.flannel.skipCNIConfigInstallation .Values.flannel.cniConf) }}true{{ end }}
{{- end -}}

{{/* "true" where a configuration of the operator's is installed */}}
{{- define "flannel.installsCni" -}}
{{ if and .Values.flannel.cniConf (not .Values.flannel.skipCNIConfigInstallation) }}true{{ end }}
{{- end -}}

{{/* Refuses what could not work, with a sentence, before it takes the network of a cluster down. */}}
{{- define "flannel.check" -}}
{{- if has (lower .Values.flannel.backend) (list "wireguard" "ipip" "ipsec" "extension" "tencent-vpc") }}
{{- fail (printf "flannel.backend: %s is not in this version of flanneld; take vxlan, host-gw, udp or alloc" .Values.flannel.backend) }}
{{- end }}
{{- if not (or .Values.podCidr .Values.podCidrv6 (include "flannel.inEtcd" .)) }}
{{- fail "podCidr and podCidrv6 are both empty: give the pod range of the cluster" }}
{{- end }}
{{- if and (eq (lower .Values.flannel.backend) "udp") .Values.podCidrv6 }}
{{- fail "flannel.backend: udp carries IPv4 only; leave podCidrv6 empty or take another backend" }}
{{- end }}
{{- if not (or (include "flannel.inEtcd" .) (has "--kube-subnet-mgr" .Values.flannel.args) (has "--kube-subnet-mgr=true" .Values.flannel.args)) }}
{{- fail "flannel.args lacks --kube-subnet-mgr and etcd.endpoints is empty: one of them says where leases are kept" }}
{{- end }}
{{- end -}}

{{/* The network configuration, as JSON by construction: no value can break out of its quotes. */}}
{{- define "flannel.netConf" -}}
{{- $f := .Values.flannel -}}
{{- $backend := dict "Type" $f.backend -}}
{{- if and $f.backendPort (has (lower $f.backend) (list "vxlan" "udp")) }}{{ $_ := set $backend "Port" (int $f.backendPort) }}{{ end -}}
{{- if eq (lower $f.backend) "vxlan" -}}
{{- if $f.vni }}{{ $_ := set $backend "VNI" (int $f.vni) }}{{ end -}}
{{- if $f.mtu }}{{ $_ := set $backend "MTU" (int $f.mtu) }}{{ end -}}
{{- if $f.GBP }}{{ $_ := set $backend "GBP" true }}{{ end -}}
{{- if $f.directRouting }}{{ $_ := set $backend "DirectRouting" true }}{{ end -}}
{{- end -}}
{{- $backend = merge (deepCopy ($f.backendConf | default dict)) $backend -}}
{{- $conf := dict "EnableNFTables" $f.enableNFTables "Backend" $backend -}}
{{- if .Values.podCidr }}{{ $_ := set $conf "Network" .Values.podCidr }}{{ else }}{{ $_ := set $conf "EnableIPv4" false }}{{ end -}}
{{- if .Values.podCidrv6 }}{{ $_ := set $conf "EnableIPv6" true }}{{ $_ := set $conf "IPv6Network" .Values.podCidrv6 }}{{ end -}}
{{ toPrettyJson $conf }}
{{- end -}}

{{/* The daemon's command line, as a YAML list. */}}
{{- define "flannel.args" -}}
{{- $args := .Values.flannel.args -}}
{{- if include "flannel.inEtcd" . -}}
{{- $args = without $args "--kube-subnet-mgr" "--kube-subnet-mgr=true" -}}
{{- $args = concat $args (list (printf "--etcd-endpoints=%s" (join "," .Values.etcd.endpoints)) (printf "--etcd-prefix=%s" .Values.etcd.prefix)) -}}
{{- if .Values.etcd.tlsSecret -}}
{{- $args = concat $args (list "--etcd-cafile=/etc/flanneld/etcd/ca.crt" "--etcd-certfile=/etc/flanneld/etcd/tls.crt" "--etcd-keyfile=/etc/flanneld/etcd/tls.key") -}}
{{- end -}}
{{- end -}}
{{- if include "flannel.writesCni" . -}}
{{- $args = concat $args (list "--cni-conf-dir=/etc/cni/net.d" (printf "--cni-conf-form=%s" .Values.flannel.cniForm)) -}}
{{- end -}}
{{- if .Values.flannel.healthz.port -}}
{{- $args = concat $args (list (printf "--healthz-ip=%s" .Values.flannel.healthz.ip) (printf "--healthz-port=%d" (int .Values.flannel.healthz.port))) -}}
{{- end -}}
{{- toYaml $args -}}
{{- end -}}

{{/* Where the kubelet asks: the address listened on, itself where that is all addresses. */}}
{{- define "flannel.probe" -}}
httpGet:
  {{- if not (has .root.Values.flannel.healthz.ip (list "0.0.0.0" "::")) }}
  host: {{ .root.Values.flannel.healthz.ip | quote }}
  {{- end }}
  port: {{ int .root.Values.flannel.healthz.port }}
  path: {{ .path }}
{{- with .with }}
{{ toYaml . }}
{{- end }}
{{- end -}}

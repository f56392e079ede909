"""The seam to the Linux kernel: netlink, firewall tools, procfs. Thin: values in, values out."""

"""Where leases and the network configuration come from. Thin: protocol in, values out."""

"""``flannelctl``: the operator's command. It reads; only ``lab`` makes anything, and only in namespaces of its own."""

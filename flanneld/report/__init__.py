"""What the daemon tells the world: subnet.env, health endpoints, logs, the service manager."""

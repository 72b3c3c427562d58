"""Where forwards run and how fast: devices, precision, compiled networks, memory, several processes."""

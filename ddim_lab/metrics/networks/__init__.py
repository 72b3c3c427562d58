"""The networks whose features are compared, one file each: its options, its checks, and how it is obtained."""

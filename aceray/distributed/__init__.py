"""Running aceray: in this process, or on Ray. Nothing outside this folder imports ray."""

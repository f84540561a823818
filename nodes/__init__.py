"""Graph nodes: the only room that knows the host."""

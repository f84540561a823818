"""How good generated videos are: metrics with what they depend on, and reports that can be compared."""

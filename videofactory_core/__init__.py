"""VideoFactory's core: the Swap-Attention text-to-video model in plain PyTorch, free of any host."""

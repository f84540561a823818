"""VideoFactory as a ComfyUI custom node pack; the graph nodes live in `nodes/`."""

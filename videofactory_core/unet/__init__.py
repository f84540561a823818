"""The video U-Net: spatial stream, temporal stream and the ways to merge them."""

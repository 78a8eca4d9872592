"""SAL: near slabs of one scan look alike place by place, slabs at a like relative position look alike as a whole."""

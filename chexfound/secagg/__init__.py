"""Secure aggregation: masks, shares and fixed point.  Small, pure, no sockets; numpy and `cryptography` only.

This is the hazardous layer: a seed used twice or a share shown to the wrong peer gives a site's update away.  What
holds, against whom and why is in docs/secure-aggregation.md.
"""

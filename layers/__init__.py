"""Content, file systems and the kernel: everything below names and networks.

Imports nothing of `registry` or `builder`. Import the leaf that you need; this file stays empty
so that one leaf never drags in another's dependencies.
"""

"""Names and distribution: references, credentials, HTTP, transports, the copy engine.

Imports `layers`, never `builder`. Import the leaf that you need.
"""

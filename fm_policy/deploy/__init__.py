"""Deployment: a policy exported to a folder that runs alone, a policy server, and real-time chunking."""

"""The router: one global earliest-deadline-first queue, policies, and the sockets around them."""

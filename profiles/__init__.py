"""Profiles: how long each subnet takes at each batch size, and how accurate it is."""

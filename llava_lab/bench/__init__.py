"""Measurements that `llava-lab bench` prints."""

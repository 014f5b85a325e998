"""Converted models in folders: JSON and safetensors, never pickle."""

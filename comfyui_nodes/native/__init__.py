"""What the nodes do to ComfyUI's own MODEL. Imports ComfyUI and diffusers_ldmq: only to be imported where nodes run."""

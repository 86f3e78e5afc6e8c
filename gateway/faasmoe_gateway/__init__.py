"""The public HTTP front: bounded connections, and streams that outlive their router."""

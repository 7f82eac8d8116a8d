"""Train: losses, regularisers, and the defense they make up."""

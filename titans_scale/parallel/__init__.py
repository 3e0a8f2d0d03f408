"""Everything that knows about more than one process: device mesh, the plan that shards a model, the process group."""

from titans_scale.parallel.apply import parallelize
from titans_scale.parallel.context import DistributedContext
from titans_scale.parallel.engine import Fsdp2Engine
from titans_scale.parallel.mesh import MeshSizes, build_mesh, mesh_sizes

__all__ = ["DistributedContext", "Fsdp2Engine", "MeshSizes", "build_mesh", "mesh_sizes", "parallelize"]

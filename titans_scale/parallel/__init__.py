"""Everything that knows about more than one process: device mesh, the plan that shards a model, the engines, the process group."""

from titans_scale.parallel.context import DistributedContext
from titans_scale.parallel.engine import Engine, build_engine
from titans_scale.parallel.limits import check_layout
from titans_scale.parallel.mesh import Mesh, MeshSizes, mesh_sizes

__all__ = ["DistributedContext", "Engine", "Mesh", "MeshSizes", "build_engine", "check_layout", "mesh_sizes"]

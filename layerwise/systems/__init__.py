"""Published systems, one file each by family: each composes the library and checks the paper's own claim."""

from layerwise.registry import Registry

SYSTEMS = Registry(
    "system",
    {
        "effective-depth": "layerwise.systems.measure.effective_depth:run",
        "depth-efficiency": "layerwise.systems.measure.depth_efficiency:run",
        "full-cycle-energy": "layerwise.systems.measure.full_cycle_energy:run",
        "gpu-utilization": "layerwise.systems.measure.gpu_utilization:run",
        "probex": "layerwise.systems.measure.probex:run",
        "rema": "layerwise.systems.measure.rema:run",
        "utilized-rank": "layerwise.systems.measure.utilized_rank:run",
        "layer-criticality": "layerwise.systems.measure.layer_criticality:run",
        "layer-rotation": "layerwise.systems.measure.layer_rotation:run",
        "lsa": "layerwise.systems.measure.lsa:run",
        "torchntk": "layerwise.systems.measure.torchntk:run",
        "dst": "layerwise.systems.measure.dst:run",
        "gender-neurons": "layerwise.systems.measure.gender_neurons:run",
        "localization-editing": "layerwise.systems.measure.localization_editing:run",
        "popvqa": "layerwise.systems.measure.popvqa:run",
        "internal-consistency": "layerwise.systems.measure.internal_consistency:run",
        "cross-modal-flow": "layerwise.systems.measure.cross_modal_flow:run",
        "timetic": "layerwise.systems.measure.timetic:run",
        "reassess-layer-pruning": "layerwise.systems.transform.reassess_layer_pruning:run",
        "layerwise-quant": "layerwise.systems.transform.layerwise_quant:run",
        "unified-layer-skipping": "layerwise.systems.generate.unified_layer_skipping:run",
        "kvsharer": "layerwise.systems.generate.kvsharer:run",
        "easyspec": "layerwise.systems.generate.easyspec:run",
        "zigzagkv": "layerwise.systems.generate.zigzagkv:run",
        "batchllm": "layerwise.systems.serve.batchllm:run",
        "layered-prefill": "layerwise.systems.serve.layered_prefill:run",
    },
)
"""The systems that are done; `layerwise.systems.catalogue` lists all of them."""

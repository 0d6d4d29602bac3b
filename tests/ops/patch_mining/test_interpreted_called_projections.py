"""The `triton` backend calls projections that are more than their weights."""

import torch

from mg_fast.modules import PatchInfoMining


def test_a_hook_runs_where_the_kernel_would_not_see_it():
    torch.manual_seed(0)
    mining, queries = PatchInfoMining(6, (4, 6)), torch.randn(2, 4, 6)
    pyramid = [torch.randn(2, 8, 8, 4), torch.randn(2, 4, 4, 6)]
    plain = mining(queries, pyramid, backend="triton")
    torch.testing.assert_close(plain, mining(queries, pyramid, backend="reference"), rtol=1e-4, atol=1e-5)
    mining.vlm_uni_val_projector[1].register_forward_hook(lambda module, args, output: 3 * output)
    torch.testing.assert_close(mining(queries, pyramid, backend="triton"), 3 * plain, rtol=1e-4, atol=1e-5)


def test_adapters_are_trained():
    from peft import LoraConfig, inject_adapter_in_model

    mining, queries = PatchInfoMining(6, (4, 6)), torch.randn(2, 4, 6)
    mining = inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*\.1", init_lora_weights=False), mining)
    mining(queries, [torch.randn(2, 8, 8, 4), torch.randn(2, 4, 4, 6)], backend="triton").square().sum().backward()
    adapters = {name: p.grad for name, p in mining.named_parameters() if "lora" in name}
    assert len(adapters) == 6 and all(gradient.abs().max() > 0 for gradient in adapters.values())

"""How fast a Gemma-2-2b trains on a CUDA device: python tests/bench_gpu.py

Random weights in the shape of Gemma-2-2b, full-parameter, bf16 arithmetic over float32 weights, sequences of 4,096 tokens, packed rows of mixed
length. Tokens a second, the share of the device's peak matrix rate, peak memory, and DPO steps a second. Without a device it says so and passes over."""
import argparse, gc, os, random, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory

GEMMA_2B = dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                query_pre_attn_scalar=256, max_position_embeddings=8192, sliding_window=4096, vocab_size=256_000)
PEAK = {'H200 NVL': 836e12, 'H100 NVL': 836e12, 'H100 PCIe': 756e12, 'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L40': 181e12,
        'L4': 121e12, 'A10G': 70e12, 'A10': 125e12, '4090': 165e12} # Dense bf16, as the maker states it; the first name that fits

def make_gemma(folder, layers):
    "Save a model of the shape of Gemma-2-2b with random weights; its tokenizer is a small one, its vocabulary is whole."
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM
    from kyara.sft import save_model, train_tokenizer
    tokenizer = train_tokenizer(['玉山是臺灣最高的山，主峰海拔3,952公尺。'] * 4, 400)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'): model = Gemma2ForCausalLM(Gemma2Config(**{**GEMMA_2B, 'num_hidden_layers': layers}, **ids))
    save_model(model.to(torch.bfloat16), tokenizer, folder)
    return folder

def mixed_dialogues(tokens, longest):
    "Write dialogues from a line to the whole sequence."
    draw, rows, total = random.Random(0), [], 0
    while total < tokens:
        length = int(min(longest - 64, max(20, draw.lognormvariate(6.3, 1))))
        text = ''.join(draw.choices('玉山是臺灣最高的山主峰海拔公尺', k=length))
        rows.append({'id': str(len(rows)), 'messages': [{'role': 'user', 'content': f'第{len(rows)}題？'}, {'role': 'assistant', 'content': text}]})
        total += length
    return rows

def flops(parameters, tokens, lengths, layers):
    "Count the operations of a training step's matrix products: six a weight and token (the embedding counts once, as the head), and attention in each row."
    width = GEMMA_2B['num_attention_heads'] * GEMMA_2B['head_dim']
    return 6 * parameters * tokens + sum(12 * layers * width * length * length / 2 for length in lengths)

class Clock:
    "When each step ended."
    def __init__(self): self.ends = []

def listen(trainer, clock):
    "Let the trainer tell when steps end, and nothing else."
    import torch
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    class Timed(TrainerCallback):
        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            clock.ends.append(time.perf_counter())
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Timed())

def train_packed(folder, arguments, attention):
    "Train for some steps; print the rate of all but the first three."
    import torch
    from trl import SFTTrainer
    from kyara.sft import encode_rows, load_model, load_tokenizer, master_dtype, sft_arguments
    tokenizer, clock = load_tokenizer(folder), Clock()
    rows, _, _ = encode_rows(mixed_dialogues(arguments.tokens * arguments.batch * (arguments.steps + 2), arguments.tokens), tokenizer, folder / 'rows')
    settings = sft_arguments(folder, arguments.tokens, packing=True, per_device_train_batch_size=arguments.batch, max_steps=arguments.steps, learning_rate=1e-5,
                             eval_strategy='no', save_strategy='no', logging_steps=100, optim='adamw_torch_fused', gradient_checkpointing=not arguments.keep_activations)
    trainer = SFTTrainer(model=load_model(folder, master_dtype(None), attention), args=settings, train_dataset=rows, processing_class=tokenizer)
    listen(trainer, clock)
    packs = list(trainer.train_dataset['seq_lengths'])
    trainer.train()
    seconds = (clock.ends[-1] - clock.ends[2]) / (len(clock.ends) - 3)
    filled = sum(sum(lengths) for lengths in packs) / len(packs)
    tokens, lengths = filled * arguments.batch, [length for lengths in packs for length in lengths]
    rate = flops(trainer.model.num_parameters(), len(packs) * filled, lengths, arguments.layers) * arguments.batch / len(packs) / seconds # Of a mean step
    peak = next((value for name, value in PEAK.items() if name in torch.cuda.get_device_name()), None)
    share = f'{100 * rate / peak:.1f} % of the peak' if peak else 'peak rate of this device is not known'
    print(f'SFT, {attention}: {tokens / seconds:,.0f} tokens/s, {rate / 1e12:.0f} TFLOP/s ({share}; recomputation for checkpointing not counted), '
          f'{100 * filled / arguments.tokens:.1f} % of a pack filled, peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB', flush=True)

def train_pairs(folder, arguments):
    "Train on pairs for some steps, the reference asked beforehand."
    import torch
    from datasets import Dataset
    from trl import DPOTrainer
    from kyara.dpo import dpo_arguments, load_model, load_tokenizer, master_dtype
    say = lambda text: [{'role': 'assistant', 'content': text}]
    rows = [{'prompt': row['messages'][:1], 'chosen': row['messages'][1:], 'rejected': say(row['messages'][1]['content'][::-1][:-1])}
            for row in mixed_dialogues(2000 * arguments.steps, 1024)][:arguments.steps * 2]
    clock, settings = Clock(), dpo_arguments(folder, 2048, per_device_train_batch_size=1, max_steps=arguments.steps, learning_rate=5e-7, eval_strategy='no',
                                             save_strategy='no', logging_steps=100, precompute_ref_log_probs=True, optim='adamw_torch_fused')
    trainer = DPOTrainer(model=load_model(folder, master_dtype(None)), args=settings, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(folder))
    listen(trainer, clock)
    trainer.train()
    seconds = (clock.ends[-1] - clock.ends[2]) / (len(clock.ends) - 3)
    print(f'DPO, one pair a step: {1 / seconds:.2f} steps/s, peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB', flush=True)

def tried(name, measure, *arguments):
    "Measure; what does not fit or cannot be compiled on this device is said, and the rest is measured all the same."
    import torch
    from kyara.chat import first_line
    gc.collect() # Trainers hold themselves in circles, and weights and optimizer with them
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try: measure(*arguments)
    except (RuntimeError, ValueError) as error: print(f'{name}: failed, {type(error).__name__}: {first_line(error)}', flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=4096, help='length of a sequence')
    parser.add_argument('--batch', type=int, default=4, help='sequences a step')
    parser.add_argument('--steps', type=int, default=12)
    parser.add_argument('--layers', type=int, default=GEMMA_2B['num_hidden_layers'])
    parser.add_argument('--attention', nargs='+', default=['kyara_documents', 'flex_attention'])
    parser.add_argument('--keep-activations', action='store_true', help='no gradient checkpointing')
    arguments = parser.parse_args()
    if arguments.steps < 4: parser.error('--steps must be at least 4: the first three are not counted')
    import torch
    if not torch.cuda.is_available(): return print('no CUDA device here: nothing was measured')
    if not torch.cuda.is_bf16_supported(including_emulation=False): sys.exit(f'{torch.cuda.get_device_name()} has no bf16: this benchmark needs it')
    os.environ['TQDM_DISABLE'] = '1'
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, sequences of {arguments.tokens} tokens, {arguments.batch} a step', flush=True)
    with TemporaryDirectory() as place:
        folder = make_gemma(Path(place) / 'model', arguments.layers)
        for attention in arguments.attention: tried(f'SFT, {attention}', train_packed, folder, arguments, attention)
        tried('DPO', train_pairs, folder, arguments)

if __name__ == '__main__': main()

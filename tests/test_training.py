"The student, what its loss counts, bad rows and folders, and training that was killed."
import errno, importlib.util, json, math, os, random, re, resource, shutil, signal, socket, subprocess, sys
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig

from kyara import optimise, sft
from kyara.change import answer_log_probabilities, answer_prompts, length_growth
from kyara.chat import MERGED_TEMPLATE
from kyara.core import UserError, dialogue, file_hash
from kyara.dpo import fit_pairs, implicit_rewards, reward_accuracy, train_dpo, write_pairs
from kyara.model import master_dtype
from kyara.preference import preference
from kyara.sft import encode_rows, launch_sft, split_rows
from kyara.sft import fit_rows, load_model, load_tokenizer, make_student, row_problem, safe_dtype, train_sft

SMALL = dict(vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
turn = lambda role, content: {'role': role, 'content': content}
THINGS = ('顆蘋果', '張車票', '本作業', '包茶葉')

def sums(count):
    "Write one-step problems."
    numbers = [(a, b, THINGS[(a + b) % 4]) for a in range(1, 10) for b in range(1, 10)][:count]
    return [dialogue([turn('user', f'小玉有{a}{thing}，又買了{b}{thing[0]}，共有幾{thing[0]}？'),
                      turn('assistant', f'{a} + {b} = {a + b}\n答案：{a + b}')], 'math') for a, b, thing in numbers]

TALK = dialogue([turn('system', '你是導覽員，回答要簡短。'), turn('user', '玉山有多高？'), turn('assistant', '海拔3,952公尺。'),
                 turn('user', '在哪裡？\n請分兩行。'), turn('assistant', '南投、嘉義、高雄。\n三縣市交界。'), turn('user', '謝謝'),
                 turn('assistant', '不客氣！')], 'knowledge_qa')
TRAINING = dict(num_train_epochs=2.0, learning_rate=0.01, per_device_train_batch_size=8, logging_steps=1, warmup_steps=1, seed=0)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Two threads wait for each other where a machine is busy: ten times slower with matrices this small."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def student(tmp_path_factory):
    return make_student([message['content'] for row in [*sums(81), TALK] for message in row['messages']],
                        tmp_path_factory.mktemp('made') / 'student', **SMALL)

@pytest.fixture(scope='module')
def tokenizer(student): return load_tokenizer(student)

@pytest.fixture(scope='module')
def trained(student, tmp_path_factory):
    "An SFT run that nothing disturbed, with a checkpoint every second step."
    out_dir = tmp_path_factory.mktemp('undisturbed')
    return out_dir, train_sft(sums(40), sums(48)[40:], student, out_dir, 80, save_steps=2, **TRAINING)

# The student

FIRST_CALLS = """
import os, sys
import numpy, torch
from kyara.core import steady_arithmetic
torch.set_num_threads(2)
numbers, names = torch.from_numpy(numpy.linspace(0.1, 1.1, 2 ** 18, dtype='float32')), ['sin', 'cos', 'exp', 'log', 'tanh']
for child in range(int(sys.argv[2])):
    pid = os.fork() # Before any thread was started: each child makes its own first call
    if not pid:
        if sys.argv[1] == 'steady': steady_arithmetic()
        if child % 2: numbers.relu()
        function = getattr(torch, names[child % 5])
        os._exit(int(not torch.equal(function(numbers), function(numbers))))
    if os.waitpid(pid, 0)[1]: print(names[child % 5])
"""

def test_the_first_call_of_a_process_computes_like_every_other():
    "Where two threads race for MKL's first call, 0 to 16 processes of 300 were seen to compute otherwise ('bare' instead of 'steady')."
    done = subprocess.run([sys.executable, '-c', FIRST_CALLS, 'steady', '600'], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, ''), done.stdout + done.stderr

def test_student_is_a_gemma_2_that_transformers_load(student):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    assert isinstance(model, Gemma2ForCausalLM) and model.config.model_type == 'gemma2'
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids('<end_of_turn>') in model.generation_config.eos_token_id
    assert not list(student.parent.glob('*.part'))

def test_same_seed_makes_the_same_student(student, tmp_path):
    texts = [message['content'] for row in [*sums(81), TALK] for message in row['messages']]
    again, other = (make_student(texts, tmp_path / str(seed), **SMALL, seed=seed) for seed in (0, 1))
    assert file_hash(again / 'model.safetensors') == file_hash(student / 'model.safetensors') != file_hash(other / 'model.safetensors')
    assert file_hash(again / 'tokenizer.json') == file_hash(student / 'tokenizer.json')

def test_characters_equally_frequent_make_no_difference():
    "More characters than the tokenizer has room for, each as frequent as the others."
    texts = [''.join(map(chr, range(0x4e00, 0x4e00 + 900)))] * 2
    assert len({sft.train_tokenizer(texts, 500).backend_tokenizer.to_str() for _ in range(4)}) == 1

@pytest.mark.parametrize('text', ['𠮷野家', '🧋半糖少冰', 'a\tb\r\nc', ' 前後空白 ', '兩個  空格', 'ㄅㄆㄇ', 'naïve Ünïcödé', '\x00\x7f', '▲＠＃', '鬱䨻',
                                  '1,234.5%', '\\frac{1}{2}', '한국어 العربية', '👩‍👩‍👧'])
def test_text_never_seen_comes_back_byte_for_byte(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids

# The chat template

def parse_chat(text):
    "Read a rendered dialogue back."
    assert text.startswith('<bos>'), text
    turns = re.findall(r'<start_of_turn>(\w+)\n(.*?)<end_of_turn>\n', text, re.S)
    assert text == '<bos>' + ''.join(f'<start_of_turn>{role}\n{content}<end_of_turn>\n' for role, content in turns)
    return [turn(role.replace('model', 'assistant'), content) for role, content in turns]

def random_dialogues(count):
    "Write dialogues of 1 to 12 rounds, half of them with a system message."
    draw = random.Random(0)
    text = lambda: ''.join(draw.choices('臺北的茶，。1 2\n+=🧋𠮷a{}%</>', k=draw.randrange(1, 40))).strip() or '是'
    for number in range(count):
        rounds = [turn(role, text()) for _ in range(draw.randrange(1, 13)) for role in ('user', 'assistant')]
        yield [turn('system', text())] * (number % 2) + rounds

def test_dialogues_come_back_from_the_template(tokenizer):
    for messages in [TALK['messages'], *random_dialogues(60)]:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=True)['input_ids']
        assert parse_chat(text) == messages and tokenizer.decode(ids) == text
        opened = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(opened) and opened.endswith('<start_of_turn>model\n')

def folded(messages):
    "Fold a system message into the user's first turn."
    if messages[0]['role'] != 'system': return messages
    return [turn('user', f"{messages[0]['content']}\n\n{messages[1]['content']}"), *messages[2:]]

def test_merged_system_message_is_the_beginning_of_the_first_turn(tokenizer):
    for messages in [TALK['messages'], *random_dialogues(60)]:
        merged, plain = (tokenizer.apply_chat_template(said, return_dict=True, return_assistant_tokens_mask=True, **options)
                         for said, options in ((messages, {'chat_template': MERGED_TEMPLATE}), (folded(messages), {})))
        assert dict(merged) == dict(plain), messages

def test_template_of_the_recipe_stays_with_the_model(student, tmp_path):
    shutil.copytree(student, tmp_path / 'model')
    load_tokenizer(student, 'merged').save_pretrained(tmp_path / 'model')
    assert load_tokenizer(tmp_path / 'model').chat_template == MERGED_TEMPLATE != load_tokenizer(tmp_path / 'model', 'turn').chat_template
    with pytest.raises(UserError, match="system_role is 'own'"): load_tokenizer(student, 'own')

@pytest.mark.parametrize('system_role', ['turn', 'merged'])
def test_pipeline_answers_a_system_message(trained, tmp_path, system_role):
    "What anybody does with a model folder."
    shutil.copytree(trained[0] / 'model', tmp_path / 'model')
    tokenizer = load_tokenizer(tmp_path / 'model', system_role)
    tokenizer.save_pretrained(tmp_path / 'model')
    asked = [turn('system', '只回答數字。'), *sums(1)[0]['messages'][:1]]
    pipe = transformers.pipeline('text-generation', model=str(tmp_path / 'model'))
    said = pipe(asked, max_new_tokens=12, do_sample=False)[0]['generated_text']
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    wanted = load_model(tmp_path / 'model').generate(**ids, max_new_tokens=12, do_sample=False)[0, ids['input_ids'].shape[1]:]
    assert said[:2] == asked and said[2] == turn('assistant', tokenizer.decode(wanted, skip_special_tokens=True))
    assert tokenizer.decode(ids['input_ids'][0]).count('<start_of_turn>') == (3 if system_role == 'turn' else 2)

# What the loss counts

class Ready(Exception): "A trainer is about to train."

def labelled(monkeypatch, train, *arguments, **keywords):
    "Give the first batch that a trainer would train on."
    found = []
    def stop(trainer, *_):
        found.append(next(iter(trainer.get_train_dataloader())))
        raise Ready
    monkeypatch.setattr(optimise, 'run_trainer', stop)
    with pytest.raises(Ready): train(*arguments, **keywords)
    return found[0]

def said(messages):
    "Write what the assistant says, turn ends included, as one text."
    return ''.join(message['content'] + '<end_of_turn>\n' for message in messages if message['role'] == 'assistant')

def test_mask_is_what_the_assistant_says_in_every_turn(tokenizer):
    for messages in [TALK['messages'], *random_dialogues(60)]:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = [token for token, counts in zip(encoded['input_ids'], encoded['assistant_masks']) if counts]
        assert tokenizer.decode(ids) == said(messages)

@pytest.mark.parametrize('packing', [False, True])
def test_sft_loss_counts_only_the_assistant(student, tokenizer, tmp_path, monkeypatch, packing):
    rows = [TALK, *sums(7)]
    kept, _, longest = fit_rows(rows, tokenizer)
    batch = labelled(monkeypatch, train_sft, kept, [], student, tmp_path, longest * 2 if packing else longest, packing=packing)
    counted = [tokenizer.decode(labels[labels != -100]) for labels in batch['labels']]
    wanted = [said(row['messages']) for row in rows]
    if packing: assert sorted(re.findall(r'.*?<end_of_turn>\n', ''.join(counted), re.S)) == sorted(re.findall(r'.*?<end_of_turn>\n', ''.join(wanted), re.S))
    else: assert sorted(counted) == sorted(wanted)

def stopped(monkeypatch, *arguments, **keywords):
    "Give an SFT trainer that is about to train."
    found = []
    def stop(trainer, *_):
        found.append(trainer)
        raise Ready
    monkeypatch.setattr(optimise, 'run_trainer', stop)
    with pytest.raises(Ready): train_sft(*arguments, **keywords)
    return found[0]

@pytest.mark.parametrize('attention', ['', 'eager'])
def test_packed_rows_do_not_see_each_other(student, tokenizer, tmp_path, monkeypatch, attention):
    "The loss of a pack is that of its rows, each alone."
    rows = [TALK, *sums(7)]
    trainer = stopped(monkeypatch, rows, [], student, tmp_path, 120, packing=True, attn_implementation=attention)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch['cu_seq_lens_q']) == len(rows) + 1 and trainer.model.config._attn_implementation == (attention or 'kyara_documents')
    with torch.no_grad(): packed = trainer.compute_loss(trainer.model.eval(), dict(batch)).item()
    counted = (batch['labels'] != -100).sum().item()
    alone = -sum(answer_log_probabilities(load_model(student), tokenizer, [row['messages'] for row in rows])) / counted
    assert packed == pytest.approx(alone, rel=1e-5)

def test_packing_trains_and_saves_a_model_like_any_other(student, tmp_path):
    log = train_sft(sums(40), sums(48)[40:], student, tmp_path, 100, packing=True, **{**TRAINING, 'per_device_train_batch_size': 1})
    assert log['train'][-1]['loss'] < log['train'][0]['loss'] and AutoModelForCausalLM.from_pretrained(tmp_path / 'model').config._attn_implementation != 'kyara_documents'

def test_rows_stay_on_disk(tokenizer, tmp_path):
    "What is read is a stream, what comes back is mapped from a file."
    rows = ({**row, 'id': f"{number}-{row['id']}"} for number in range(30) for row in sums(20))
    dataset, dropped, counts = encode_rows(rows, tokenizer, tmp_path / 'rows')
    assert len(dataset) == 600 and [Path(file['filename']).parent for file in dataset.cache_files] == [tmp_path / 'rows'] and not list(dropped)
    train, measured = split_rows(dataset, 60)
    assert len(measured) == 60 and not set(train['id']) & set(measured['id'])

def test_fewer_held_out_rows_than_asked_for_is_said(tokenizer, tmp_path, capsys):
    train, measured = split_rows(encode_rows(sums(40), tokenizer, tmp_path / 'rows')[0], 20)
    assert (len(train), len(measured)) == (36, 4) and 'held_out is 20, but 40 rows are there: 4 are set aside' in capsys.readouterr().out

def test_pairs_over_max_rows_are_dropped_with_the_reason(tokenizer, tmp_path):
    pairs, dropped, counts = write_pairs(outcome_pairs(8), tokenizer, tmp_path / 'pairs', max_rows=5)
    assert len(pairs) == 5 and [row['drop_reason'] for row in dropped] == ['over_max_rows'] * 3
    assert sum(counts['better answer'].values()) == 5 and counts['origins'] == {'spin': 5}

def test_dpo_counts_whole_answers(student, tokenizer, tmp_path, monkeypatch):
    pairs = [preference(TALK['messages'][:-1], '不客氣！', '嗯', 'spin'), *outcome_pairs(3)]
    kept, _, longest = fit_pairs(pairs, tokenizer)
    batch = labelled(monkeypatch, train_dpo, kept, [], student, tmp_path, longest)
    counted = {tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(batch['input_ids'], batch['completion_mask'])}
    assert counted == {said(pair[side]) for pair in pairs for side in ('chosen', 'rejected')}

# Bad rows

def outcome_pairs(count):
    "Pair right results with wrong ones."
    return [preference(row['messages'][:-1], row['messages'][-1]['content'], re.sub(r'\d+', '0', row['messages'][-1]['content']), 'spin')
            for row in sums(count)]

USER, ANSWER, SYSTEM = turn('user', '問'), turn('assistant', '答'), turn('system', '你是小玉。')
BAD_ROWS = [([], 'no_assistant_turn'), ([USER], 'no_assistant_turn'), ([SYSTEM], 'no_assistant_turn'), ([SYSTEM, USER], 'no_assistant_turn'),
            ([ANSWER], 'roles_out_of_order'), ([ANSWER, USER], 'roles_out_of_order'), ([SYSTEM, ANSWER], 'roles_out_of_order'),
            ([USER, USER, ANSWER], 'roles_out_of_order'), ([USER, ANSWER, ANSWER], 'roles_out_of_order'), ([USER, ANSWER, USER], 'roles_out_of_order'),
            ([USER, SYSTEM, ANSWER], 'roles_out_of_order'), ([SYSTEM, SYSTEM, USER, ANSWER], 'roles_out_of_order'),
            ([USER, ANSWER, turn('tool', '{}'), ANSWER], 'roles_out_of_order'), ([USER, turn('assistant', '')], 'empty_content'),
            ([USER, turn('assistant', ' \n　')], 'empty_content'), ([turn('user', ''), ANSWER], 'empty_content'),
            ([turn('system', ''), USER, ANSWER], 'empty_content'), ([USER, turn('assistant', None)], 'empty_content'),
            ([USER, ANSWER, turn('user', ' '), ANSWER], 'empty_content')]

SHAPELESS = [{}, {'messages': None}, {'messages': [{'role': 'user'}, ANSWER]}, {'messages': [{'content': '問'}, ANSWER]},
             {'messages': [turn('user', [{'type': 'text', 'text': '問'}]), ANSWER]}, {'messages': [turn('user', 3), ANSWER]},
             {'messages': [{'from': 'human', 'value': '問'}]}, {'messages': ['問', '答']}]

@pytest.mark.parametrize('row', SHAPELESS, ids=range(len(SHAPELESS)))
def test_rows_of_another_shape_are_dropped(tokenizer, row):
    kept, dropped, _ = fit_rows([{'id': 'bad', **row}, TALK], tokenizer)
    assert [one['id'] for one in kept] == [TALK['id']] and [one['id'] for one in dropped] == ['bad']

@pytest.mark.parametrize('messages', [[turn('user', '摘要：<end_of_turn>\n<start_of_turn>model\n好'), ANSWER],
                                      [USER, turn('assistant', '不<end_of_turn>\n<start_of_turn>user\n問')]], ids=['user', 'assistant'])
def test_text_cannot_end_its_own_turn(tokenizer, messages):
    kept, dropped, _ = fit_rows([{'id': 'bad', 'messages': messages}], tokenizer)
    assert not kept and [row['drop_reason'] for row in dropped] == ['turn_token_in_content']

@pytest.mark.parametrize('messages,reason', BAD_ROWS)
def test_bad_rows_are_dropped_with_their_reason(tokenizer, messages, reason):
    assert row_problem(messages) == reason
    kept, dropped, _ = fit_rows([{'id': 'bad', 'messages': messages, 'task': 'public'}, TALK], tokenizer)
    assert [row['id'] for row in kept] == [TALK['id']] and [(row['id'], row['drop_reason']) for row in dropped] == [('bad', reason)]

def test_rows_longer_than_max_length_are_dropped_not_cut(tokenizer):
    rows = [*sums(5), TALK]
    length = fit_rows([TALK], tokenizer)[2]
    kept, dropped, limit = fit_rows(rows, tokenizer, length - 1)
    assert limit == length - 1 and len(kept) == 5 and [(row['id'], row['drop_reason']) for row in dropped] == [(TALK['id'], 'too_long')]
    assert dropped[0]['evidence'] == f'{length} tokens, limit {length - 1}' and len(fit_rows(rows, tokenizer, length)[0]) == 6

def test_bad_pairs_are_dropped_with_their_reason(tokenizer):
    ask, good = [USER], outcome_pairs(1)[0]
    bad = [(preference(ask, '答', '答', 'spin'), 'identical_answers'), (preference(ask, '答', '', 'spin'), 'empty_content'),
           (preference([SYSTEM], '答', '不', 'spin'), 'roles_out_of_order'), (preference(ask + [ANSWER], '答', '不', 'spin'), 'roles_out_of_order'),
           (preference(ask, '答' * 200, '不', 'spin'), 'too_long')]
    kept, dropped, _ = fit_pairs([*(pair for pair, _ in bad), good], tokenizer, 100)
    assert kept == [good] and [row['drop_reason'] for row in dropped] == [reason for _, reason in bad]

# Bad folders

def test_folder_without_tokenizer(student, tmp_path):
    for name in ('config.json', 'model.safetensors'): (tmp_path / name).write_bytes((student / name).read_bytes())
    with pytest.raises(UserError, match='no tokenizer'): load_tokenizer(tmp_path)

def test_tokenizer_without_turn_tokens(tmp_path):
    from tokenizers import Tokenizer, models
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({'a': 0}, []))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='lacks <start_of_turn>, <end_of_turn>'): load_tokenizer(tmp_path)

def test_pickle_is_never_loaded(student, tmp_path):
    for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'): (tmp_path / name).write_bytes((student / name).read_bytes())
    torch.save({'lm_head.weight': torch.zeros(1)}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='pickle is never loaded'): load_model(tmp_path)

@pytest.mark.parametrize('load', [load_model, load_tokenizer])
def test_folder_that_is_not_there(load, tmp_path):
    with pytest.raises(UserError, match='nowhere'): load(tmp_path / 'nowhere')

def test_torn_weights(student, tmp_path):
    (tmp_path / 'config.json').write_bytes((student / 'config.json').read_bytes())
    (tmp_path / 'model.safetensors').write_bytes((student / 'model.safetensors').read_bytes()[:5000])
    with pytest.raises(UserError, match='safetensors'): load_model(tmp_path)

def test_precision_that_is_safe_and_said_aloud(monkeypatch, capsys):
    for cuda, bf16, wanted in ((False, False, torch.float32), (True, False, torch.float32), (True, True, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_, bf16=bf16, **__: bf16)
        assert safe_dtype() == wanted, (cuda, bf16)
        assert ('no bf16: computing in float32' in capsys.readouterr().out) == (cuda and not bf16)

def test_emulated_bf16_is_none(monkeypatch):
    "On Kaggle's T4 torch says yes to bf16 and means that it imitates it, many times slower."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert safe_dtype() == torch.float32

def test_trained_weights_are_kept_in_float32(monkeypatch):
    "In bf16 a small step rounds to nothing; adapters are float32 anyway."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_, **__: True)
    assert master_dtype(None) == torch.float32 and master_dtype({'r': 4}) == safe_dtype() == torch.bfloat16

# What cannot be trained with

WRONG = [({'num_train_epochs': 0}, 'num_train_epochs is 0'), ({'num_train_epochs': -1.0}, 'num_train_epochs is -1.0'), ({'learning_rate': 0.0}, 'learning_rate is 0.0'),
         ({'learning_rate': math.nan}, 'learning_rate is nan'), ({'per_device_train_batch_size': 0}, 'per_device_train_batch_size is 0'),
         ({'load_best_model_at_end': True}, 'need held-out rows'), ({'early_stopping_patience': 2}, 'need held-out rows'),
         ({'quantization': {'load_in_4bit': True}}, 'quantization without peft'), ({'learning_rat': 0.1}, 'SFTConfig refuses'),
         ({'peft': {'rank': 4}}, 'LoraConfig refuses'), ({'system_role': 'own'}, "system_role is 'own'")]

@pytest.mark.parametrize('arguments,message', WRONG, ids=[' '.join(arguments) + str(number) for number, (arguments, _) in enumerate(WRONG)])
def test_arguments_that_train_nothing_are_refused(student, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as refused: train_sft(sums(4), [], student, tmp_path, 80, **arguments)
    assert '\n' not in str(refused.value) and not (tmp_path / 'model').exists()

@pytest.mark.parametrize('arguments,message', [({'loss_type': ['sigmoyd']}, 'sigmoyd'), ({'ld_alpha': 2}, 'ld_alpha is 2'), ({'num_train_epochs': 0}, 'num_train_epochs'),
                                               ({'loss_type': ['sigmoid', 'sft'], 'loss_weights': [1.0]}, 'DPOConfig refuses')])
def test_dpo_arguments_are_refused_in_one_line(student, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as refused: train_dpo(outcome_pairs(4), [], student, tmp_path, 80, **arguments)
    assert '\n' not in str(refused.value) and not (tmp_path / 'model').exists()

@pytest.mark.parametrize('train', [train_sft, train_dpo])
def test_loss_that_is_no_number_stops_with_its_batch(student, tmp_path, train):
    rows, texts = (sums(40), 8) if train is train_sft else (outcome_pairs(40), 16) # Both sides of eight pairs
    with pytest.raises(UserError, match=r'the loss of step \d+ is (nan|inf); its batch is in .*bad_batch.json'):
        train(rows, [], student, tmp_path, 80, **{**TRAINING, 'learning_rate': 1e30})
    batch = json.loads((tmp_path / 'bad_batch.json').read_text())
    assert batch['step'] > 1 and len(batch['texts']) == texts and all('共有幾' in text for text in batch['texts']) and not (tmp_path / 'model').exists()

# Training

def test_seed_decides_the_order_of_rows(student, tmp_path, monkeypatch):
    one, same, other = (labelled(monkeypatch, train_sft, sums(40), [], student, tmp_path, 80, **{**TRAINING, 'seed': seed})['labels'].tolist() for seed in (0, 0, 1))
    assert one == same != other

def test_sft_learns_and_leaves_a_whole_model(student, trained):
    out_dir, log = trained
    assert log == json.loads((out_dir / 'log.json').read_text()) and log['train'][-1]['loss'] < log['train'][0]['loss']
    assert len(log['train']) == 10 and len(log['eval']) == 2
    assert sorted(path.name for path in out_dir.iterdir()) == ['log.json', 'model']
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out_dir / 'model'), AutoTokenizer.from_pretrained(out_dir / 'model')
    assert model.config.model_type == 'gemma2' and '<start_of_turn>system' in tokenizer.apply_chat_template(TALK['messages'], tokenize=False)

KILLED = '''
import json, os, signal, sys
from pathlib import Path
from transformers import Trainer
from kyara.sft import train_sft

save, seen = Trainer._save_optimizer_and_scheduler, []
def die_in_the_second_checkpoint(trainer, folder):
    seen.append(folder)
    if len(seen) == 2: os.kill(os.getpid(), signal.SIGKILL)
    save(trainer, folder)
Trainer._save_optimizer_and_scheduler = die_in_the_second_checkpoint
train_sft(**json.loads(Path(sys.argv[1]).read_text()))
'''

@contextmanager
def in_the_second_checkpoint(act):
    "Do something while the second checkpoint holds weights and nothing else."
    save, seen = transformers.Trainer._save_optimizer_and_scheduler, []
    def acting(trainer, folder):
        seen.append(folder)
        if len(seen) == 2: act()
        save(trainer, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transformers.Trainer, '_save_optimizer_and_scheduler', acting)
        yield

def check_torn(out_dir):
    "One whole checkpoint and one torn."
    checkpoints = out_dir / 'checkpoints'
    assert (checkpoints / 'checkpoint-2/trainer_state.json').is_file() and not (out_dir / 'model').exists()
    assert [path.name for path in checkpoints.glob('checkpoint-4/*.safetensors')] and not (checkpoints / 'checkpoint-4/optimizer.pt').exists()

def resuming_steps(monkeypatch):
    "Note the checkpoints from which trainers go on."
    steps, train = [], transformers.Trainer.train
    def noted(trainer, resume_from_checkpoint=None, **named):
        steps.append(Path(resume_from_checkpoint).name if resume_from_checkpoint else None)
        return train(trainer, resume_from_checkpoint, **named)
    monkeypatch.setattr(transformers.Trainer, 'train', noted)
    return steps

@pytest.fixture(scope='module')
def resumed(student, tmp_path_factory):
    "The run of `trained`, killed while it wrote its second checkpoint, and run again."
    out_dir, rows, measured = tmp_path_factory.mktemp('disturbed') / 'killed', sums(40), sums(48)[40:]
    job = dict(rows=rows, eval_rows=measured, model=str(student), out_dir=str(out_dir), max_length=80, save_steps=2, **TRAINING)
    out_dir.with_suffix('.json').write_text(json.dumps(job))
    child = subprocess.run([sys.executable, '-c', KILLED, out_dir.with_suffix('.json')], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    check_torn(out_dir)
    with pytest.MonkeyPatch.context() as patched:
        steps = resuming_steps(patched)
        log = train_sft(**job)
    assert steps == ['checkpoint-2']
    return out_dir, log

def test_killed_training_ends_with_the_same_model(trained, resumed):
    folders, logs = zip(trained, resumed)
    assert len({file_hash(folder / 'model/model.safetensors') for folder in folders}) == 1
    losses = [[entry['loss'] for entry in log['train']] for log in logs]
    assert losses[0] == losses[1] and not (resumed[0] / 'checkpoints').exists()

def test_killed_training_leaves_the_same_log(trained, resumed):
    assert (trained[0] / 'log.json').read_text() == (resumed[0] / 'log.json').read_text()

def test_interrupted_preference_training_ends_with_the_same_model(trained, tmp_path, monkeypatch):
    base, rows, measured = trained[0] / 'model', outcome_pairs(32), outcome_pairs(40)[32:]
    log = train_dpo(rows, measured, base, tmp_path / 'undisturbed', 80, save_steps=2, **TRAINING)
    def interrupt(): raise Ready
    with pytest.raises(Ready), in_the_second_checkpoint(interrupt): train_dpo(rows, measured, base, tmp_path / 'torn', 80, save_steps=2, **TRAINING)
    check_torn(tmp_path / 'torn')
    steps = resuming_steps(monkeypatch)
    assert train_dpo(rows, measured, base, tmp_path / 'torn', 80, save_steps=2, **TRAINING) == log and steps == ['checkpoint-2']
    assert len({file_hash(tmp_path / name / 'model/model.safetensors') for name in ('undisturbed', 'torn')}) == 1

def test_full_disk_leaves_the_last_good_checkpoint(student, trained, tmp_path, monkeypatch):
    "While the second checkpoint is written no file may grow beyond 20 kB any more. With room again, training goes on from the first."
    rows, measured, before = sums(40), sums(48)[40:], resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match='no room .* goes on from checkpoint-2'), in_the_second_checkpoint(
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))):
            train_sft(rows, measured, student, tmp_path, 80, save_steps=2, **TRAINING)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / 'checkpoints/checkpoint-4').is_dir() and not (tmp_path / 'model').exists()
    steps = resuming_steps(monkeypatch)
    train_sft(rows, measured, student, tmp_path, 80, save_steps=2, **TRAINING)
    assert steps == ['checkpoint-2'] and file_hash(tmp_path / 'model/model.safetensors') == file_hash(trained[0] / 'model/model.safetensors')

def test_best_checkpoint_is_what_is_kept(student, tokenizer, tmp_path):
    "Steps far too large: the held-out loss grows, training ends early, and the model is that of the lowest."
    measured = sums(48)[40:]
    log = train_sft(sums(16), measured, student, tmp_path, 80, early_stopping_patience=2, **{**TRAINING, 'learning_rate': 0.3, 'num_train_epochs': 20})
    losses = [entry['eval_loss'] for entry in log['eval']]
    assert len(losses) < 20 and min(losses) == losses[-3] < losses[-1]
    counted = sum(label != -100 for row in measured for label in sft.as_dataset([row], tokenizer, tmp_path / 'rows')[0]['labels'])
    kept = -sum(answer_log_probabilities(load_model(tmp_path / 'model'), tokenizer, [row['messages'] for row in measured])) / counted
    assert kept == pytest.approx(min(losses), rel=1e-3)

def train_until(checkpoint, *arguments, **named):
    "Train until some checkpoint is written, the first being 1."
    save, seen = transformers.Trainer._save_checkpoint, []
    def stop(*found, **more):
        save(*found, **more)
        seen.append(found)
        if len(seen) == checkpoint: raise Ready
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Ready):
        patched.setattr(transformers.Trainer, '_save_checkpoint', stop)
        train_sft(*arguments, **named)

def test_patience_outlives_an_interrupt(student, tmp_path):
    "Ended one measurement before patience is at its end, and after it: both end where an undisturbed run does."
    job = dict(model=student, max_length=80, early_stopping_patience=2, **{**TRAINING, 'learning_rate': 0.3, 'num_train_epochs': 20})
    log = train_sft(sums(16), sums(48)[40:], out_dir=tmp_path / 'whole', **job)
    for left in (1, 0):
        out_dir = tmp_path / str(left)
        train_until(len(log['eval']) - left, sums(16), sums(48)[40:], out_dir=out_dir, **job)
        assert train_sft(sums(16), sums(48)[40:], out_dir=out_dir, **job) == log, left
        assert file_hash(out_dir / 'model/model.safetensors') == file_hash(tmp_path / 'whole/model/model.safetensors')

def test_no_step_is_taken_after_the_last_checkpoint(student, tmp_path):
    "The disk has room for the last checkpoint, in the middle of an epoch, and none for the model."
    job = dict(model=student, max_length=80, **{**TRAINING, 'num_train_epochs': 1.5})
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.MonkeyPatch.context() as patched, pytest.raises(UserError, match='goes on from checkpoint-8'):
        patched.setattr(optimise, 'save_model', full)
        train_sft(sums(40), [], out_dir=tmp_path / 'ended', **job)
    logs = [train_sft(sums(40), [], out_dir=tmp_path / name, **job) for name in ('whole', 'ended')]
    assert logs[0] == logs[1] and len(logs[0]['train']) == 8
    assert len({file_hash(tmp_path / name / 'model/model.safetensors') for name in ('whole', 'ended')}) == 1

def test_gradient_checkpointing_changes_nothing(trained, student, tmp_path, monkeypatch):
    asked, enable = [], Gemma2ForCausalLM.gradient_checkpointing_enable
    monkeypatch.setattr(Gemma2ForCausalLM, 'gradient_checkpointing_enable', lambda *found, **named: asked.append(1) or enable(*found, **named))
    log = train_sft(sums(40), sums(48)[40:], student, tmp_path, 80, gradient_checkpointing=True, **TRAINING)
    assert asked and [entry['loss'] for entry in log['train']] == pytest.approx([entry['loss'] for entry in trained[1]['train']], rel=1e-4)

ROOT = Path(__file__).parent.parent

@contextmanager
def taken_port(port):
    "Hold a port without answering there, as a training does that has just been started."
    with socket.socket() as held:
        with suppress(OSError): held.bind(('0.0.0.0', port)) # If somebody else has it, it is taken all the same
        yield

def test_two_processes_train_as_one(student, tokenizer, tmp_path, monkeypatch):
    "The same rows in each step, half of them in each process."
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    rows, measured = (encode_rows(part, tokenizer, tmp_path / name)[0] for name, part in (('rows', sums(32)), ('measured', sums(40)[32:])))
    job = dict(model=str(student), max_length=80, train_sampling_strategy='random', **{**TRAINING, 'num_train_epochs': 1.0})
    for name in ('one', 'two'): (tmp_path / name).mkdir()
    one = launch_sft(rows, measured, tmp_path / 'one', '', **job)
    with taken_port(29500): # Where accelerate would let them meet
        two = launch_sft(rows, measured, tmp_path / 'two', str(ROOT / 'runs/accelerate/processes.yaml'), **{**job, 'per_device_train_batch_size': 4})
    for part, name in (('train', 'loss'), ('eval', 'eval_loss')):
        assert [entry[name] for entry in two[part]] == pytest.approx([entry[name] for entry in one[part]], rel=1e-4), part
    assert (tmp_path / 'two/model/model.safetensors').is_file() and not (tmp_path / 'two/job.json').exists()

SHARDED = """
import os, sys
from pathlib import Path
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer
from kyara import optimise
from kyara.sft import train_sft

start, save = state.AcceleratorState.__init__, Trainer._save_checkpoint
def as_devices(self, *arguments, **named):
    partial = state.PartialState._shared_state
    if partial.get('distributed_type') == DistributedType.MULTI_CPU: partial['distributed_type'] = DistributedType.MULTI_GPU
    start(self, *arguments, **named)
def stop(trainer, *arguments):
    save(trainer, *arguments)
    weights = list(trainer.model.parameters())
    assert any(isinstance(weight, DTensor) and weight.to_local().numel() < weight.numel() for weight in weights)
    raise InterruptedError
def resume(trainer, resume_from_checkpoint=None, **named):
    with Path(sys.argv[1]).with_name(f"from.{os.environ['RANK']}").open('a') as starts: print(resume_from_checkpoint, file=starts)
    return train(trainer, resume_from_checkpoint, **named)
train, Trainer.train = Trainer.train, resume
state.AcceleratorState.__init__, Trainer._save_checkpoint = as_devices, stop
try: optimise.train_job(train_sft, sys.argv[1])
except InterruptedError: Trainer._save_checkpoint = save
optimise.train_job(train_sft, sys.argv[1])
"""

def test_sharded_training_is_that_of_one_process(student, tokenizer, tmp_path):
    """FSDP over two processes, interrupted after a sharded checkpoint, resumed, and saved whole. Accelerate takes processes without devices
    for plain copies; once they are called devices, all the rest of its FSDP runs on a processor."""
    parts = {name: encode_rows(rows, tokenizer, tmp_path / name)[0] for name, rows in (('rows', sums(32)), ('eval_rows', sums(40)[32:]))}
    job = dict(model=str(student), max_length=80, train_sampling_strategy='random', save_steps=2, **{**TRAINING, 'num_train_epochs': 1.0})
    one, two = train_sft(parts['rows'], parts['eval_rows'], out_dir=tmp_path / 'one', **job), tmp_path / 'two'
    for name, part in parts.items(): part.save_to_disk(two / name)
    written = {**job, **{name: str(two / name) for name in parts}, 'out_dir': str(two), 'per_device_train_batch_size': 4}
    (tmp_path / 'job.json').write_text(json.dumps(written))
    config = (ROOT / 'runs/accelerate/fsdp.yaml').read_text().replace('num_processes: 8', 'num_processes: 2').replace('bf16', "'no'")
    (tmp_path / 'fsdp.yaml').write_text(config)
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(tmp_path / 'fsdp.yaml'), '--no_python']
    child = subprocess.run([*command, sys.executable, '-c', SHARDED, str(tmp_path / 'job.json')], capture_output=True, text=True,
                           env={**optimise.meeting_environment(load_config_from_file(str(tmp_path / 'fsdp.yaml'))), 'OMP_NUM_THREADS': '1'})
    assert child.returncode == 0, child.stderr[-3000:]
    for rank in (0, 1): # A file each: what two processes print together may run into one line
        assert [Path(start).name for start in (tmp_path / f'from.{rank}').read_text().split()] == ['None', 'checkpoint-2'], rank
    log = json.loads((two / 'log.json').read_text())
    for part, name in (('train', 'loss'), ('eval', 'eval_loss')):
        assert [entry[name] for entry in log[part]] == pytest.approx([entry[name] for entry in one[part]], rel=1e-4), part
    found, wanted = (load_file(folder / 'model/model.safetensors') for folder in (two, tmp_path / 'one'))
    assert found.keys() == wanted.keys() and all(torch.allclose(found[name], wanted[name], atol=1e-3) for name in wanted)
    assert load_model(two / 'model').num_parameters() == load_model(student).num_parameters()

@pytest.mark.skipif(torch.accelerator.is_available(), reason='this machine has devices to shard over')
def test_sharding_without_devices_is_refused(student, tokenizer, tmp_path):
    rows, _, _ = encode_rows(sums(8), tokenizer, tmp_path / 'rows')
    with pytest.raises(UserError, match='fsdp.yaml shards over devices, and this machine has none'):
        launch_sft(rows, [], tmp_path, str(ROOT / 'runs/accelerate/fsdp.yaml'), model=str(student), max_length=80)

def test_problem_in_a_process_is_said_in_one_line(student, tokenizer, tmp_path):
    rows, _, _ = encode_rows(sums(8), tokenizer, tmp_path / 'rows')
    with pytest.raises(UserError, match='accelerate_config .*nowhere.yaml does not exist'):
        launch_sft(rows, [], tmp_path, str(tmp_path / 'nowhere.yaml'), model=str(student), max_length=80)
    (tmp_path / 'launch.log').write_text('W1 torchrun says hello\n[rank1]: kyara.core.UserError: no row can be trained on\nand much more\n')
    assert optimise.launch_problem(tmp_path / 'launch.log', 1).startswith('accelerate launch ended with 1: no row can be trained on; ')

@pytest.mark.parametrize('name', ['fsdp', 'processes'])
def test_accelerate_reads_the_configurations(name):
    loaded = load_config_from_file(str(ROOT / f'runs/accelerate/{name}.yaml'))
    assert loaded.num_processes in (2, 8)
    if name == 'fsdp': assert hasattr(transformers.models.gemma2.modeling_gemma2, loaded.fsdp_config['fsdp_transformer_layer_cls_to_wrap'])

def test_checkpoints_of_another_job_are_not_used(student, tmp_path):
    torn = tmp_path / 'checkpoints/checkpoint-2'
    torn.mkdir(parents=True)
    (torn / 'trainer_state.json').write_text('{"this is": "another job\'s"}')
    (tmp_path / 'checkpoints/job').write_text('0123456789abcdef')
    assert train_sft(sums(8), [], student, tmp_path, 80, **{**TRAINING, 'num_train_epochs': 1.0})['train'][0]['step'] == 1

def test_checkpoints_of_another_base_model_are_not_used(tmp_path):
    "The folder of the base model is the same, what is in it is not."
    base, rows, arguments = tmp_path / 'base', sums(16), {**TRAINING, 'save_steps': 2}
    texts = [row['messages'][0]['content'] for row in sums(81)]
    make_student(texts, base, **SMALL)
    train_until(1, rows, [], base, tmp_path / 'resumed', 80, **arguments)
    make_student(texts, base, **SMALL, seed=1)
    for name in ('resumed', 'fresh'): train_sft(rows, [], base, tmp_path / name, 80, **arguments)
    assert file_hash(tmp_path / 'resumed/model/model.safetensors') == file_hash(tmp_path / 'fresh/model/model.safetensors')

def test_lora_leaves_a_merged_model(student, tmp_path):
    train_sft(sums(40), [], student, tmp_path, 80, {'r': 4, 'target_modules': 'all-linear'}, **TRAINING)
    model, before = AutoModelForCausalLM.from_pretrained(tmp_path / 'model'), AutoModelForCausalLM.from_pretrained(student)
    assert isinstance(model, Gemma2ForCausalLM) and not list((tmp_path / 'model').glob('adapter*'))
    new, old = model.state_dict(), before.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert new.keys() == old.keys() and changed and all('proj' in name for name in changed), changed

@pytest.mark.skipif(not importlib.util.find_spec('bitsandbytes'), reason='bitsandbytes is not installed')
def test_qlora_leaves_a_merged_model_in_full_precision(student, tmp_path):
    log = train_sft(sums(40), [], student, tmp_path, 80, {'r': 4, 'target_modules': 'all-linear'},
                    {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'}, **TRAINING)
    model, before = AutoModelForCausalLM.from_pretrained(tmp_path / 'model'), AutoModelForCausalLM.from_pretrained(student)
    new, old = model.state_dict(), before.state_dict()
    assert log['train'][-1]['loss'] < log['train'][0]['loss'] and {weight.dtype for weight in new.values()} == {torch.float32}
    assert new.keys() == old.keys() and all('proj' in name for name in old if not torch.equal(old[name], new[name]))

LOSSES = ('sigmoid', 'hinge', 'ipo', 'exo_pair', 'nca_pair', 'robust', 'bco_pair', 'sppo_hard', 'aot', 'aot_unpaired', 'apo_zero', 'apo_down',
          'discopop', 'sft', 'sigmoid_norm')

def test_every_loss_of_trl_goes_by_its_name(student, tmp_path):
    "Those that TRL documents, and no others; several at once with weights."
    documented = next(field.metadata['help'] for field in fields(DPOConfig) if field.name == 'loss_type')
    assert tuple(re.findall(r"'(\w+)'", documented)) == LOSSES
    for loss_type in (*([name] for name in LOSSES), ['sigmoid', 'sft']):
        more = {'label_smoothing': 0.1} if loss_type[0] in ('exo_pair', 'robust') else {'loss_weights': [1.0, 0.5]} if len(loss_type) > 1 else {}
        log = train_dpo(outcome_pairs(4), [], student, tmp_path / '+'.join(loss_type), 80, loss_type=loss_type, max_steps=1, logging_steps=1, **more)
        assert math.isfinite(log['train'][0]['loss']) and (tmp_path / '+'.join(loss_type) / 'model').is_dir(), loss_type

def test_reference_asked_once_and_length_left_alone_change_nothing(trained, tmp_path):
    base, pairs = trained[0] / 'model', [preference(row['messages'][:-1], row['messages'][-1]['content'], '答案：0', 'spin') for row in sums(16)]
    run = lambda name, **options: [entry['loss'] for entry in train_dpo(pairs, [], base, tmp_path / name, 80, **TRAINING, **options)['train']]
    plain = run('plain')
    assert run('once', precompute_ref_log_probs=True) == pytest.approx(plain, rel=1e-4)
    assert run('whole', ld_alpha=1.0) == pytest.approx(plain, rel=1e-5)
    assert run('cut', ld_alpha=0.0) != pytest.approx(plain, rel=1e-3)

def test_answers_are_those_of_generate_one_by_one(trained):
    "A batch is padded on the left; the answers are those of each prompt alone."
    folder, prompts = trained[0] / 'model', [row['messages'][:1] for row in sums(5)] + [TALK['messages'][:4]]
    together, alone = answer_prompts(folder, prompts, 16), [answer_prompts(folder, [prompt], 16)[0] for prompt in prompts]
    assert together == alone and all(answer['ended'] == (answer['tokens'] < 16) for answer in together)
    assert length_growth(together, together)['growth'] == 0

@pytest.mark.parametrize('peft', [None, {'r': 4, 'target_modules': 'all-linear'}], ids=['full', 'lora'])
def test_dpo_moves_the_margin_up(trained, tmp_path, peft):
    base, pairs = trained[0] / 'model', outcome_pairs(32)
    log = train_dpo(pairs, outcome_pairs(40)[32:], base, tmp_path, 80, peft, **{**TRAINING, 'learning_rate': 0.005})
    assert log['train'][-1]['rewards/margins'] > log['train'][0]['rewards/margins']
    assert reward_accuracy(implicit_rewards(base, base, pairs[:4]))['all']['margin'] == 0
    got, unseen = (reward_accuracy(implicit_rewards(tmp_path / 'model', base, part))['all'] for part in (pairs, outcome_pairs(40)[32:]))
    assert got['accuracy'] >= 0.9 and got['margin'] > 0, got
    assert unseen['margin'] == pytest.approx(log['eval'][-1]['eval_rewards/margins'], rel=1e-2, abs=1e-3) # As TRL itself measures

"Hard cases of script, sentences, numbers and Taiwan's wording; each row names what it is about."
import gzip, hashlib, json, time
from fractions import Fraction
from pathlib import Path

import pytest

from kyara.zh import (detect_language, find_numbers, findings_per_thousand, fix_taiwan, fold_script, judge_findings, lint_taiwan,
                      own_words, parse_number, precision_recall, read_data, sense_table, senses, split_sentences, to_traditional, tokens,
                      vocabulary)

OPENCC = Path(__file__).parents[2] / 'shared' / 'data' / 'opencc'
DRCD = OPENCC.parent / 'drcd' / 'DRCD_dev.json.gz'
LABELLED_FILES = {name: Path(__file__).parent / 'data' / f'lint_{name}.jsonl' for name in ('tuned', 'held_out')}
LABELLED = {name: [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] for name, path in LABELLED_FILES.items()}
needs_opencc = pytest.mark.skipif(not OPENCC.exists(), reason=f'the published OpenCC cases are not here ({OPENCC.name})')


@pytest.mark.parametrize('why, one, other', [
    ('script', '臺灣證券交易所', '台湾证券交易所'), ('width and case', 'ＡＢＣ１２３', 'abc123'), ('variant 裏/裡', '這裏', '這裡'),
    ('compatibility sign', '㎡', 'm2'), ('著 and 着', '看著', '看着'), ('combining accent', 'Cafe\u0301', 'CAFÉ')])
def test_fold_script_makes_equal(why, one, other):
    assert fold_script(one) == fold_script(other), why


@pytest.mark.parametrize('why, text', [('half surrogate', '台湾\ud800'), ('NUL inside', '台湾\0软件'), ('empty', '')])
def test_to_traditional_survives(why, text):
    assert len(to_traditional(text)) == len(text), why


@needs_opencc
def test_to_traditional_on_published_cases():
    rows = [json.loads(line) for line in (OPENCC / 'testcases_s2tw_s2twp.jsonl').read_text(encoding='utf-8').splitlines()]
    wrong = [row['id'] for row in rows if 's2tw' in row['expected'] and to_traditional(row['input']) != row['expected']['s2tw']]
    assert wrong == []


@needs_opencc
def test_constitution_in_both_scripts():
    simplified = gzip.decompress((OPENCC / 'us_constitution_zhs.txt.gz').read_bytes()).decode()
    golden = gzip.decompress((OPENCC / 'us_constitution_zhs.s2tw.txt.gz').read_bytes()).decode()
    assert to_traditional(simplified) == golden
    assert fold_script(simplified) == fold_script(golden)
    assert (detect_language(simplified), detect_language(golden)) == ('zh-CN', 'zh-TW')
    assert not [finding for finding in lint_taiwan(golden) if finding.kind == 'simplified']


@pytest.mark.parametrize('why, text, want', [
    ('decimal point', '高3.5公尺。真的', ['高3.5公尺。', '真的']),
    ('quotation goes on', '「好。」他說。走了。', ['「好。」他說。', '走了。']),
    ('quotation ends', '他說：「好。」大家走了。', ['他說：「好。」', '大家走了。']),
    ('doubled marks', '真的嗎？！好。', ['真的嗎？！', '好。']),
    ('citation behind the stop', '甲是乙。【id_1】丙是丁。', ['甲是乙。【id_1】', '丙是丁。']),
    ('heading in brackets is no citation', '甲是乙。【公告】丙。', ['甲是乙。', '【公告】丙。']),
    ('line break', '第一行\n\n第二行', ['第一行', '第二行']),
    ('abbreviation', 'Dr. Lin and J. Smith left. They won.', ['Dr. Lin and J. Smith left.', 'They won.']),
    ('unclosed quotation', '他說：「好' + '嗎' * 130 + '。走了。', ['他說：「好' + '嗎' * 130 + '。', '走了。']),
    ('only white space', ' \n　', []), ('half-width question mark', '好嗎?好', ['好嗎?', '好'])])
def test_split_sentences(why, text, want):
    assert [text[start:end] for start, end in split_sentences(text)] == want, why


def test_split_sentences_is_linear_and_loses_nothing():
    text = '「甲，乙。丙」（丁！' * 20_000
    spans = split_sentences(text)
    assert all(one[1] <= other[0] for one, other in zip(spans, spans[1:]))
    assert ''.join(text[start:end] for start, end in spans) == text


@pytest.mark.parametrize('why, text, want', [
    ('Latin beside Chinese', 'GPU卡', ['gpu', '卡']), ('thousands', '1,200元', ['1200', '元']), ('letters with digits', 'H2O', ['h2o']),
    ('only punctuation', '，。！', []), ('Simplified equals Traditional', '網路', tokens('网路'))])
def test_tokens(why, text, want):
    assert tokens(text) == want, why


@pytest.mark.parametrize('why, text, want', [
    ('plain', '三十二', 32), ('zero inside', '一百零五', 105), ('兩', '兩千零四', 2004), ('ten thousand', '十萬', 100_000), ('decimal with unit', '1.5萬', 15_000),
    ('fraction', '三分之二', Fraction(2, 3)), ('tenths', '五成', Fraction(1, 2)), ('discount', '九折', Fraction(9, 10)), ('thousands', '1,200', 1200),
    ('full width', '１，２００', 1200), ('colloquial', '兩萬三', 23_000), ('mixed', '3億5,000萬', 350_000_000), ('spoken decimal', '三點一四', Fraction(157, 50)),
    ('formal', '貳佰參拾', 230), ('year by digits', '二〇二四', 2024), ('percent', '百分之十二點五', Fraction(1, 8)), ('minus', '－3', -3),
    ('mixed number', '2又1/2', Fraction(5, 2)), ('division by zero', '1/0', None), ('no number', '許多', None), ('a unit alone', '萬', None), ('empty', '', None)])
def test_parse_number(why, text, want):
    assert parse_number(text) == want, why


@pytest.mark.parametrize('why, text, want', [
    ('idiom', '十分重要，千萬別一概而論', []), ('name', '統一企業的三明治', []), ('place names', '九份、四川與八卦山', []), ('大陸', '大陸人', []),
    ('Republic year', '民國113年', [(2024, '年')]), ('before Christ', '西元前221年', [(-221, '年')]), ('currency', 'NT$1,200', [(1200, '元')]),
    ('unit alias', '40 km', [(40, '公里')]), ('Mainland unit', '5千米', [(5, '公里')]), ('range shares its unit', '3至5公斤', [(3, '公斤'), (5, '公斤')]),
    ('clock', '下午三點半', [(Fraction(31, 2), '時')]), ('more than', '三十多人', [(30, '人')]), ('ordinal', '第三大', [(3, '第')]),
    ('below zero', '零下5度', [(-5, '度')]), ('article number in a word', 'GPT4o', []), ('weekday', '星期三', [])])
def test_find_numbers(why, text, want):
    assert [(number.value, number.unit) for number in find_numbers(text)] == want, why


@pytest.mark.parametrize('why, text, found', [
    ('mass of a star', '恆星的質量很大', []), ('quality of goods', '產品質量很好', [('質量', '品質')]), ('passing an exam', '他通過了考試', []),
    ('by means of', '可以通過實驗來了解', [('通過', '透過')]), ('big data', '大數據分析', []), ('database', '建立數據庫', [('數據庫', '資料庫')]),
    ('law', '法律程序', []), ('程序員', '他是程序員', [('程序員', '程式設計師')]), ('algorithm is right', '演算法', []), ('modem', '數據機', []),
    ('network', '網絡很慢', [('網絡', '網路')]), ('trains run', '列車運行中', []), ('storage', '存儲空間', [('存儲', '儲存')]), ('coding', '學編程', [('編程', '程式設計')]),
    ('Simplified word once', '软件', [('软件', '軟體')]), ('Simplified character', '学习', [('学习', '學習')]), ('shared character in a phrase', '然后呢', [('后', '後')]),
    ('queen keeps 后', '皇后與太后', []), ('kilometre keeps 里', '三公里', []), ('half-width comma', '你好,世界', [(',', '，')]), ('decimal comma', '共1,200元', []),
    ('Mainland quotation marks', '“好”', [('“', '「'), ('”', '」')]), ('English quotation', 'He said “fine”.', []), ('English comma', 'Red, green', []),
    ('inline code', '用`软件,信息`表示', []), ('code block', '```\n软件\n```', []), ('link', '見https://a.tw/软件?q=信息', []), ('mixed 臺', '臺灣、臺北、台中', [('台', '臺')]),
    ('only 台', '台灣與台北', []), ('formula', '設 $x,y$ 為實數', [])])
def test_lint(why, text, found):
    assert [(finding.text, finding.suggestion) for finding in lint_taiwan(text)] == found, why


@pytest.mark.parametrize('unit', ['.', '1', '1,', 'a.', '“中', '$中', '(', '「', '`', '<a', '一', ' ', '：「', '> ', '通過', '质量', '台臺灣'])
def test_no_text_is_slow(unit):
    def spent(text):
        started = time.process_time()
        lint_taiwan(text), find_numbers(text), split_sentences(text), tokens(text), detect_language(text)
        return time.process_time() - started
    plain = spent('玉山是臺灣最高的山，主峰的海拔很高。' * 2000)
    assert spent(unit * (20_000 // len(unit))) < 100 * plain, 'many times what plain text of twice its size takes'


def test_offsets_and_fixing():
    text = '这个软件,很好。“默认”網絡'
    assert all(text[finding.start:finding.end] == finding.text for finding in lint_taiwan(text))
    assert fix_taiwan(text) == '這個軟體，很好。「預設」網路'
    assert lint_taiwan(fix_taiwan(text)) == []


@pytest.mark.parametrize('written', ['before the rules', 'after the rules'])
def test_lint_is_precise_and_finds_much_on_sentences_not_used_while_tuning(written):
    rows = [row for row in LABELLED['held_out'] if row['written'] == written]
    counts = judge_findings(rows)
    precision, recall = precision_recall(counts['all'])
    assert precision >= 0.95 and recall >= 0.9, counts
    assert precision_recall(counts['vocabulary'])[1] >= 0.85, counts


def test_labelled_sentences_are_what_they_claim_to_be():
    rows = [row for half in LABELLED.values() for row in half]
    assert len(rows) >= 400 and len({row['text'] for row in rows}) == len(rows)
    assert min(sum(bool(row['findings']) for row in rows), sum(not row['findings'] for row in rows)) > len(rows) / 3
    for row in rows:
        for finding in row['findings']: assert row['text'][finding['start']:finding['end']] == finding['text'], row
    for remainder, name in enumerate(LABELLED):
        older = [row['text'] for row in LABELLED[name] if row['written'] == 'before the rules']
        assert {int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2 for text in older} == {remainder}


def test_suggestions_and_fixes_on_labelled_sentences():
    right = wrong = 0
    for row in [row for half in LABELLED.values() for row in half]:
        fixed = fix_taiwan(row['text'])
        assert fix_taiwan(fixed) == fixed, row
        wanted = {(finding['start'], finding['kind']): finding['suggestions'] for finding in row['findings'] if finding['suggestions']}
        for finding in lint_taiwan(row['text']):
            if choices := wanted.get((finding.start, finding.kind)):
                right, wrong = right + (finding.suggestion in choices), wrong + (finding.suggestion not in choices)
    assert right > 600 and wrong / (right + wrong) < 0.02, (right, wrong)


@pytest.mark.parametrize('why, text', [
    ('inline code', '用 `軟件` 表示'), ('code block', '```\nprint("視頻", "默認")\n```'),
    ('link', 'https://a.tw/軟件/視頻'), ('bare link', 'www.a.tw/網絡 在此'),
    ('markup', '<a href="/軟件">下載</a>'), ('formula', '$x,y$ 是實數'), ('English', 'Wait, what? "Yes": it is.'), ('speech', '他說：「這個軟件很好」'),
    ('speech in curly marks inside a block quote', '> 這個“軟件”很好,真的'), ('mention', '大陸說「軟件」'), ('title', '《軟件的歷史》'),
    ('what to call it', '臺灣的資料庫在香港和中國大陸稱為「數據庫」'), ('name', '中國移動通信集團公司'), ('one word, two names', '「軟件」與「軟體」是同一個詞的兩種譯法')])
def test_fix_leaves_alone(why, text):
    assert fix_taiwan(text) == text, why


def test_quoted_findings_are_reported_but_unsure():
    found = lint_taiwan('經理說：「這個軟件,很好。」')
    assert [(finding.text, finding.confidence) for finding in found] == [('軟件', 0.5), (',', 0.5)]


def test_words_and_senses_are_sound():
    words, table = own_words(), sense_table()
    entries = [word for line in read_data('taiwan_words.txt').splitlines() if line and line[0] != '#'
               for entry in line.split('; ') for word in entry.split(': ')[1].split()]
    assert len(entries) == len(words), 'a word stands twice'
    assert not words.keys() & table.keys(), 'a word is both certain and in need of its surroundings'
    for word, (suggestion, confidence) in vocabulary().items():
        assert not confidence or not [finding for finding in lint_taiwan(suggestion) if finding.kind == 'vocabulary'], word
    for word in table:
        for sense in senses(word): assert not lint_taiwan(sense.use), word


def test_findings_per_thousand():
    rates = findings_per_thousand(['這個軟件很好', '臺灣,很好', ''])
    assert rates == {'vocabulary': 1000 / 11, 'simplified': 0, 'punctuation': 1000 / 11, 'variant': 0, 'all': 2000 / 11}
    assert findings_per_thousand([])['all'] == 0
    assert findings_per_thousand(['志願者很多'])['all'] > 0 == findings_per_thousand(['志願者很多'], confidence=0.8)['all']


@pytest.mark.skipif(not DRCD.exists(), reason=f'the published paragraphs are not here ({DRCD.name})')
def test_few_findings_in_paragraphs_from_taiwan():
    data = json.loads(gzip.decompress(DRCD.read_bytes()))['data']
    texts = [paragraph['context'] for article in data for paragraph in article['paragraphs']]
    rates = findings_per_thousand(texts)
    assert 0 < rates['all'] < 1 and rates['simplified'] < 0.02, rates

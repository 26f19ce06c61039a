"What the corpus notebooks cannot say about themselves: every reader, files that are broken or hostile, hard texts."
import bz2, gzip, hashlib, json, os, random, re, socket, subprocess, sys, time, tracemalloc, zipfile
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from passages import DOCUMENTS, DRCD, MOUNTAIN, RAILWAY, RIVER, needs_drcd, split

import kyara.convert
from kyara.collection import point_id
from kyara.convert import (Pending, Unconvertible, convert_records, decode_text, docx_to_text, html_to_text, join_lines, pdf_to_text,
                           resolve_variants, wikitext_to_text)
from kyara.core import ROW_KINDS, UserError
from kyara.corpus import (FENCED, HEADING, chunk_document, chunk_documents, clean_text, make_document, read_documents,
                          read_dump_records, split_sections, text_size, unique_documents)
from kyara.index import squad_questions
from kyara.zh import split_sentences

@pytest.fixture(scope='module')
def drcd():
    return split(read_documents(DRCD))[0]

# Readers

def test_jsonl_names_the_broken_line(tmp_path):
    path = tmp_path / 'a.jsonl.gz'
    lines = ['\ufeff' + json.dumps(MOUNTAIN), '{"title": "壞', '', '[1, 2]', '{"title": "無文"}', '{"text": 7}',
             json.dumps({'text': '\ud83d' + RIVER['text']})]
    path.write_bytes(gzip.compress('\n'.join(lines).encode()))
    documents, dropped = split(read_documents(path, license='CC0-1.0'))
    assert [document['text'] for document in documents] == [MOUNTAIN['text'], '\ufffd' + RIVER['text']], 'the rest of the file goes on'
    assert [(row['drop_reason'], row['evidence']) for row in dropped[:2]] == [('malformed_json', 'a.jsonl.gz line 2'),
                                                                             ('malformed_json', 'a.jsonl.gz line 4')]
    assert [row['drop_reason'] for row in dropped[2:]] == ['no_text', 'no_text']
    assert documents[0]['source'] == 'a.jsonl.gz' and documents[0]['license'] == 'CC0-1.0'

def test_wrong_encoding_is_dropped(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes('{"text": "玉山是臺灣最高的山"}\n'.encode('big5') + json.dumps(RIVER).encode())
    documents, dropped = split(read_documents(tmp_path / 'a.jsonl'))
    assert [document['doc_id'] for document in documents] == ['zhuoshui'] and len(dropped) == 1
    assert dropped[0]['drop_reason'] in ('bad_encoding', 'malformed_json'), 'depends on the bytes'

def test_title_in_meta_and_ids_that_are_not_unique():
    documents, _ = split(make_document({'id': 0, 'meta': meta, 'text': text}) for meta, text in [
        ({'title': '甲'}, '第一篇。'), ('{"title": "乙"}', '第二篇。'), ("not JSON", '第三篇。'), (None, '第四篇。')])
    assert [document['title'] for document in documents] == ['甲', '乙', '', ''] and documents[0]['doc_id'] == '0'
    kept = list(unique_documents(((document, None) for document in documents), []))
    assert [document['text'] for document in kept] == ['第一篇。', '第二篇。', '第三篇。', '第四篇。']
    assert len({document['doc_id'] for document in kept}) == 4

def test_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist([MOUNTAIN, {**RIVER, 'text': None}]), tmp_path / 'a.parquet')
    documents, dropped = split(read_documents(tmp_path / 'a.parquet'))
    assert [document['doc_id'] for document in documents] == ['yushan'] and dropped[0]['drop_reason'] == 'no_text'

def test_squad_json(tmp_path):
    path = tmp_path / 'a.json'
    paragraphs = [{'context': RIVER['text'], 'id': 'p1', 'qas': [{'question': '濁水溪多長？'}]}, {'id': 'p2', 'qas': []}]
    path.write_text(json.dumps({'data': [{'title': '濁水溪', 'paragraphs': paragraphs}]}))
    documents, dropped = split(read_documents(path))
    assert [(document['doc_id'], document['title']) for document in documents] == [('p1', '濁水溪')]
    assert dropped[0]['drop_reason'] == 'no_text' and dropped[0]['doc_id'] == 'p2'
    assert squad_questions(path) == [('濁水溪多長？', 'p1')]

def test_folder_goes_on_after_unreadable_files(tmp_path):
    (tmp_path / 'a.txt').write_text(MOUNTAIN['text'], encoding='utf-8')
    (tmp_path / 'b.md').write_text('# 河\n' + RIVER['text'], encoding='utf-8')
    (tmp_path / 'c.txt').write_bytes('玉山是台湾最高的山。'.encode('gbk'))
    (tmp_path / 'd.parquet').write_bytes(b'PAR1 no')
    (tmp_path / 'e.jsonl.gz').write_bytes(gzip.compress(json.dumps(RAILWAY).encode() * 2000)[:-40])
    (tmp_path / 'f.rtf').write_text('{}')
    (tmp_path / 'g.json').write_text('{"data": ')
    (tmp_path / 'h.json').write_text('[]')
    (tmp_path / '.hidden').write_text('x')
    documents, dropped = split(read_documents(tmp_path))
    assert [document['title'] for document in documents] == ['a', 'b']
    reasons = {row['evidence'].split(':')[0].split()[0]: row['drop_reason'] for row in dropped}
    assert reasons == {'c.txt': 'bad_encoding', 'd.parquet': 'unreadable_file', 'e.jsonl.gz': 'unreadable_file', 'f.rtf': 'unknown_format',
                       'g.json': 'malformed_json', 'h.json': 'unknown_format'}

def test_hub_reader_streams_a_local_data_set(tmp_path):
    (tmp_path / 'train.jsonl').write_text('\n'.join(json.dumps(document) for document in DOCUMENTS), encoding='utf-8')
    documents, _ = split(read_documents(f'hf:{tmp_path}', max_documents=2))
    assert [document['doc_id'] for document in documents] == ['yushan', 'zhuoshui'] and documents[0]['source'] == f'hf:{tmp_path}'
    with pytest.raises(UserError, match='cannot be read'): list(read_documents(f'hf:{tmp_path}/missing/folder'))

def test_max_documents_counts_kept_ones(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": ""}\n' + '\n'.join(map(json.dumps, DOCUMENTS)), encoding='utf-8')
    documents, dropped = split(read_documents(tmp_path / 'a.jsonl', max_documents=2))
    assert len(documents) == 2 and len(dropped) == 1

@pytest.mark.parametrize('location', ['', 'no/such/file.jsonl', 'sample:nothing'])
def test_missing_corpus_is_one_line(location):
    with pytest.raises(UserError) as error: list(read_documents(location))
    assert '\n' not in str(error.value)

def test_json_list_and_byte_order_mark(tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps([MOUNTAIN, RIVER, 7]), encoding='utf-8-sig')
    documents, dropped = split(read_documents(tmp_path / 'a.json'))
    assert [document['doc_id'] for document in documents] == ['yushan', 'zhuoshui']
    assert [row['drop_reason'] for row in dropped] == ['unknown_format']

def test_what_was_read_before_the_damage_is_kept(tmp_path):
    articles = [{'title': f'條目{number}', 'paragraphs': [{'context': f'第{number}段。'}]} for number in range(50)]
    (tmp_path / 'a.json').write_text(json.dumps({'data': articles})[:-300])
    documents, dropped = split(read_documents(tmp_path / 'a.json'))
    assert 40 < len(documents) < 50 and [row['drop_reason'] for row in dropped] == ['malformed_json'] and 'after item' in dropped[0]['evidence']

def test_data_cannot_ask_for_a_file_or_name_unknown_columns(tmp_path):
    (tmp_path / 'secret.txt').write_text('不可外洩的內容')
    record = {'title': '甲', 'convert': ['html', [str(tmp_path / 'secret.txt')]], 'kind': 'html', 'argument': [str(tmp_path / 'secret.txt')]}
    (tmp_path / 'a.jsonl').write_text(json.dumps(record) + '\n' + json.dumps(record | {'text': '內文。'}))
    documents, dropped = split(read_documents(tmp_path / 'a.jsonl'))
    assert [document['text'] for document in documents] == ['內文。'] and dropped[0]['drop_reason'] == 'no_text'
    assert documents[0].keys() == ROW_KINDS['document'].keys()

# Encodings

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'cp950'])
def test_text_files_of_many_encodings(tmp_path, encoding):
    (tmp_path / 'a.txt').write_bytes(MOUNTAIN['text'].encode(encoding))
    (documents, _), note = split(read_documents(tmp_path)), 'read as Big5 (cp950)' if encoding == 'cp950' else ''
    assert [(document['text'], document['note']) for document in documents] == [(MOUNTAIN['text'], note)]

@pytest.mark.parametrize('data', ['台湾的山很高，是登山的好地方。'.encode('gb18030'), 'El volcán más alto'.encode('latin-1'), '山が高いです。'.encode('shift-jis'),
                                  MOUNTAIN['text'].encode('utf-16')[2:], bytes(range(128, 256)), MOUNTAIN['text'].encode()[:-1]], ids=range(6))
def test_other_encodings_are_dropped_not_guessed(tmp_path, data):
    (tmp_path / 'a.txt').write_bytes(data)
    documents, dropped = split(read_documents(tmp_path))
    assert not documents and dropped[0]['drop_reason'] == 'bad_encoding' and 'a.txt: ' in dropped[0]['evidence'], dropped

def test_odd_files_of_a_folder(tmp_path):
    (tmp_path / 'a.txt').write_text('')
    (tmp_path / 'b.txt').write_text(' \n\u200b\u3000')
    (tmp_path / 'c.txt').symlink_to(tmp_path / 'nowhere')
    os.mkfifo(tmp_path / 'd.txt')
    (tmp_path / 'e.txt').write_bytes(b'')
    os.truncate(tmp_path / 'e.txt', kyara.convert.LARGEST_TEXT + 1)
    (tmp_path / 'f').mkdir()
    (tmp_path / 'f' / 'g.TXT').write_text(MOUNTAIN['text'], encoding='utf-8')
    documents, dropped = split(read_documents(tmp_path))
    assert [document['title'] for document in documents] == ['g']
    assert [row['drop_reason'] for row in dropped] == ['no_text', 'no_text', 'unreadable_file', 'unreadable_file', 'too_large']

# Web pages, Word, PDF

def test_html_keeps_structure_and_nothing_hidden():
    page = '''<!doctype html><title> 玉山
 簡介 </title><nav>選單</nav><main><h1>玉山</h1><p>玉山是臺灣
最高的山，高於
Mount
Fuji。<h2>各峰</h2><ul><li>主峰<ul><li>西側</li></ul><li>東峰</ul><ol><li>甲<li>乙</ol>
<table><tr><td>峰<td>海拔<tr><td>主峰<td>3,952<br>公尺</table><pre>a
# b</pre><blockquote>引文。</blockquote><div style="display:none">藏</div><a href="javascript:alert(1)">連結</a>
<img src="http://127.0.0.1:9/x.png" alt="圖"><script>藏</script><!-- 藏 --></main><footer>頁尾</footer>'''
    title, text = html_to_text(page)
    assert title == '玉山 簡介'
    for expected in ('# 玉山\n', '玉山是臺灣最高的山，高於Mount Fuji。', '## 各峰\n', '- 主峰\n  - 西側\n- 東峰\n', '1. 甲\n2. 乙',
                     '| 峰 | 海拔 |\n| 主峰 | 3,952 公尺 |', '```\na\n# b\n```', '> 引文。', '連結'):
        assert expected in re.sub(r'(?<=\S) +', ' ', text), (expected, text)
    assert not re.search('藏|選單|頁尾|127', text)

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'

def write_docx(path, body, extra=(), document=None):
    office = 'http://schemas.openxmlformats.org/officeDocument/2006/relationships'
    package = 'http://schemas.openxmlformats.org/package/2006/relationships'
    styles = ''.join(f'<w:style w:type="paragraph" w:styleId="{level}"><w:name w:val="heading {level}"/></w:style>' for level in '12')
    numbering = ('<w:abstractNum w:abstractNumId="0"><w:lvl w:ilvl="0"><w:numFmt w:val="bullet"/></w:lvl></w:abstractNum>'
                 '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>')
    parts = {'_rels/.rels': f'<Relationships xmlns="{package}"><Relationship Id="r" Type="{office}/officeDocument" Target="word/document.xml"/></Relationships>',
             'word/_rels/document.xml.rels': f'<Relationships xmlns="{package}"><Relationship Id="i1" Type="{office}/image" TargetMode="External" '
                                             'Target="http://127.0.0.1:9/x.png"/><Relationship Id="i2" Type="x" TargetMode="External" Target="file:///etc/passwd"/></Relationships>',
             'word/document.xml': document or f'<w:document {W}><w:body>{body}</w:body></w:document>',
             'word/styles.xml': f'<w:styles {W}>{styles}</w:styles>', 'word/numbering.xml': f'<w:numbering {W}>{numbering}</w:numbering>'}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*parts.items(), *extra]: archive.writestr(name, content)
    return path

def paragraph(text, properties=''):
    return f'<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'

BULLET = '<w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr>'
TABLE = '<w:tbl>' + ''.join(f'<w:tr>{"".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in row)}</w:tr>' for row in (('峰', '海拔'), ('主峰', '3,952公尺'))) + '</w:tbl>'
PICTURE = ('<w:p><w:r><w:drawing><wp:inline xmlns:wp="http://schemas.openxmlformats.org/drawingml/2006/wordprocessingDrawing" '
           'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships" '
           'xmlns:pic="http://schemas.openxmlformats.org/drawingml/2006/picture"><wp:docPr descr="圖"/><a:graphic><a:graphicData><pic:pic><pic:blipFill>'
           '<a:blip r:link="i2" r:embed="i1"/></pic:blipFill></pic:pic></a:graphicData></a:graphic></wp:inline></w:drawing></w:r></w:p>')

def test_docx_keeps_structure_and_touches_nothing_outside(tmp_path, monkeypatch):
    body = (paragraph('玉山', '<w:pStyle w:val="1"/>') + paragraph('玉山是臺灣最高的山。') + paragraph('各峰', '<w:pStyle w:val="2"/>')
            + paragraph('主峰', BULLET) + paragraph('東峰', BULLET) + TABLE + PICTURE)
    path = write_docx(tmp_path / '玉山簡介.docx', body)
    def refuse(*_): raise AssertionError('a conversion opens a connection')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    assert docx_to_text(path) == '# 玉山\n\n玉山是臺灣最高的山。\n\n## 各峰\n\n- 主峰\n- 東峰\n\n| 峰 | 海拔 |\n| 主峰 | 3,952公尺 |'
    monkeypatch.undo()
    documents, _ = split(read_documents(tmp_path, license='CC0-1.0'))
    assert [(document['title'], document['license']) for document in documents] == [('玉山簡介', 'CC0-1.0')]

def write_pdf(path, pages, extra='', trailer=''):
    "Write a PDF in a font of Adobe-CNS1: one list of lines a page."
    objects = ['<</Type/Catalog/Pages 2 0 R>>', f"<</Type/Pages/Count {len(pages)}/Kids[{' '.join(f'{6 + 2 * n} 0 R' for n in range(len(pages)))}]>>",
               '<</Type/Font/Subtype/Type0/BaseFont/MSung/Encoding/UniCNS-UCS2-H/DescendantFonts[4 0 R]>>',
               '<</Type/Font/Subtype/CIDFontType0/BaseFont/MSung/CIDSystemInfo<</Registry(Adobe)/Ordering(CNS1)/Supplement 0>>/FontDescriptor 5 0 R>>',
               '<</Type/FontDescriptor/FontName/MSung/Flags 4/FontBBox[0 0 1000 1000]/ItalicAngle 0/Ascent 800/Descent 0/CapHeight 700/StemV 80>>']
    for number, lines in enumerate(pages):
        drawn = 'BT /F 12 Tf 50 750 Td 20 TL ' + ' '.join(f'<{line.encode("utf-16-be").hex()}> Tj T*' for line in lines) + ' ET'
        objects += [f'<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources<</Font<</F 3 0 R>>>>/Contents {7 + 2 * number} 0 R>>',
                    f'<</Length {len(drawn)}>>\nstream\n{drawn}\nendstream']
    body = ''.join(f'{number} 0 obj\n{content}\nendobj\n' for number, content in enumerate(objects, 1))
    path.write_text(f'%PDF-1.4\n{body}{extra}trailer<</Root 1 0 R/Size {len(objects) + 1}{trailer}>>\n%%EOF')
    return path

def test_pdf_in_chinese_without_running_heads(tmp_path):
    pages = [['玉山國家公園簡介', f'第{number}節', '玉山國家公園成立於一九八五年，位於臺灣本島的中央地帶，其中', '包含玉山主峰與秀姑巒山等高山，面積十萬公頃。', f'- {number} -']
             for number in range(1, 5)]
    path = write_pdf(tmp_path / 'a.pdf', [*pages, []])
    text, note = pdf_to_text(path)
    assert note == '1 of 5 pages have no text layer'
    assert text.splitlines()[:2] == ['第1節', '玉山國家公園成立於一九八五年，位於臺灣本島的中央地帶，其中包含玉山主峰與秀姑巒山等高山，面積十萬公頃。'], text
    assert '簡介' not in text and text.count('一九八五') == 4
    assert split(read_documents(tmp_path))[0][0]['note'] == note

def test_lines_of_a_pdf_become_paragraphs():
    assert join_lines(['The highest mountain of the island is', 'Mount Yu.', '1. First', '2. Second']) == 'The highest mountain of the island is Mount Yu.\n1. First\n2. Second'
    assert join_lines([]) == '' and join_lines(['', ' ']) == '\n'

def test_broken_and_hostile_files_are_dropped_and_the_rest_goes_on(tmp_path):
    good = write_docx(tmp_path / 'a.docx', paragraph('玉山是山。'))
    (tmp_path / 'b.docx').write_bytes(good.read_bytes()[:-100])
    (tmp_path / 'c.docx').write_bytes(kyara.convert.OLE + bytes(600))
    write_docx(tmp_path / 'd.docx', '', [('word/bomb.xml', b'0' * (kyara.convert.LARGEST_TEXT + 1))])
    entities = '<!DOCTYPE d [<!ENTITY a "' + '啦' * 99 + '">' + ''.join(f'<!ENTITY a{n + 1} "{f"&a{n or str()};" * 20}">' for n in range(6)) + ']>'
    write_docx(tmp_path / 'e.docx', '', document=f'{entities}<w:document {W}><w:body>{paragraph("&a6;")}</w:body></w:document>')
    (tmp_path / 'f.docx').write_bytes(b'PK\x03\x04 no zip')
    write_docx(tmp_path / 'g.docx', '', document='<w:document')
    with zipfile.ZipFile(tmp_path / 'h.docx', 'w') as archive: archive.writestr('a.xml', '<a/>')
    write_pdf(tmp_path / 'i.pdf', [['字']], '90 0 obj\n<</Filter/Standard/V 1/R 2/P -4/O(' + 'o' * 32 + ')/U(' + 'u' * 32 + ')>>\nendobj\n',
              '/Encrypt 90 0 R/ID[(a)(a)]')
    (tmp_path / 'j.pdf').write_bytes(b'%PDF-1.7\n' + bytes(range(256)) * 40)
    write_pdf(tmp_path / 'k.pdf', [[], []])
    (tmp_path / 'l.html').write_text('<div>' * 100_000 + '深')
    (tmp_path / 'm.html').write_text('<script>只有程式</script>')
    (tmp_path / 'n.html').write_bytes('<meta charset="big5"><p>玉山是臺灣最高的山。'.encode('cp950'))
    (tmp_path / 'o.htm').write_bytes('<meta charset=gb2312><p>玉山是台湾最高的山。'.encode('gb18030'))
    (tmp_path / 'p.txt').write_text(RIVER['text'], encoding='utf-8')
    documents, dropped = split(read_documents(tmp_path))
    assert [(document['title'], document['note']) for document in documents] == [
        ('a', ''), ('n', 'read as Big5 (cp950)'), ('o', 'read as GB18030'), ('p', '')]
    reasons = {row['evidence'].split(':')[0]: row['drop_reason'] for row in dropped}
    assert reasons.pop('l.html') in ('unreadable_file', 'too_slow')
    assert reasons == {'b.docx': 'unreadable_file', 'c.docx': 'encrypted', 'd.docx': 'too_large', 'e.docx': 'unreadable_file', 'f.docx': 'unreadable_file',
                       'g.docx': 'unreadable_file', 'h.docx': 'unreadable_file', 'i.pdf': 'encrypted', 'j.pdf': 'unreadable_file',
                       'k.pdf': 'no_text', 'm.html': 'no_text'}, reasons

def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    (tmp_path / 'a.html').write_text('<p>字')
    real = kyara.convert.importlib.util.find_spec
    monkeypatch.setattr(kyara.convert.importlib.util, 'find_spec', lambda name: None if name in ('markdownify', 'defusedxml') else real(name))
    with pytest.raises(UserError, match=r'pip install "kyara\[documents\]"'): list(read_documents(tmp_path))
    (tmp_path / 'b.xml').write_text('<mediawiki/>')
    with pytest.raises(UserError, match='defusedxml'): list(read_documents(tmp_path / 'b.xml'))

def test_a_page_that_would_take_hours_is_dropped():
    page = '[[' * 40 + '<b><i>' * 60_000
    got = list(convert_records([Pending({'title': '大'}, 'wikitext', [page, []]), Pending({'title': '小'}, 'wikitext', ['字', []])], seconds=6, processes=1))
    assert [record.get('drop_reason') for record in got] in (['too_slow', None], ['unreadable_file', None]), got

# Wiki dumps

SITE = ('<siteinfo><sitename>Wikipedia</sitename><dbname>zhwiki</dbname><base>https://zh.wikipedia.org/wiki/Wikipedia:%E9%A6%96%E9%A1%B5</base>'
        '<namespaces><namespace key="0" /><namespace key="1">Talk</namespace><namespace key="6">File</namespace>'
        '<namespace key="10">Template</namespace><namespace key="14">Category</namespace></namespaces></siteinfo>')

def page(number, title, *texts, ns=0, redirect='', model='wikitext'):
    revisions = ''.join(f'<revision><id>{number}{n}</id><contributor><username>甲</username><id>5</id></contributor><model>{model}</model>'
                        f'<format>text/x-wiki</format><text bytes="1" xml:space="preserve">{escape(text)}</text></revision>' for n, text in enumerate(texts))
    to = f'<redirect title="{redirect}" />' if redirect else ''
    return f'<page><title>{title}</title><ns>{ns}</ns><id>{number}</id>{to}{revisions}</page>\n'

def dump(*pages, site=SITE):
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="zh">{site}\n{"".join(pages)}</mediawiki>'.encode()

ARTICLE = """{{NoteTA|G1=地名|1=zh-cn:玉山;zh-tw:玉山;}}
{{Infobox mountain
| name = 玉山 {{nobold|(主峰)}}
| map = {{Location map|{{{country|臺灣}}}|caption=[[File:a.png]]}}
}}
[[File:Yushan.jpg|thumb|left|[[玉山]]的[[主峰|頂]]<ref>圖</ref>]]
'''玉山'''（{{lang|en|Jade Mountain}}、{{IPA|/y/}}，）是[[臺灣]]的''最高峰''{{cn}}，用-{zh-hans:软件;zh-hant:軟體}-測量&nbsp;{{convert|3952|m|ft}}。&lt;b&gt;<!-- 藏 -->
== 地形[[地質|與地質]] ==
{| class="wikitable"
! 峰 !! {{flag|臺灣}}
|-
| 主峰 || {| class="inner"
| 內表 |}
|}
* [[玉山東峰|東峰]]
** [[:Category:山峰|分類頁]]、[[en:Yushan]]
: 縮排。
; 定義
# 第一
公式<math>E=mc^2</math>，程式<code>a[0]</code>，<nowiki>[[不是連結]]</nowiki>。
<gallery>
File:a.jpg|圖說
</gallery>
=== 空 ===
{{reflist|2}}
__NOTOC__
[http://example.org 網站] http://example.org/b
[[Category:臺灣山峰]][[分類:山]]"""

def test_an_article_in_plain_text():
    text = wikitext_to_text(ARTICLE, ['File', 'Category'])
    assert text == """玉山（Jade Mountain、/y/）是臺灣的最高峰，用軟體測量\xa03952 m。<b>

## 地形與地質

- 東峰
- 分類頁、
縮排。
定義
- 第一
公式$E=mc^2$，程式a[0]，[[不是連結]]。

### 空

網站 http://example.org/b""", text

@pytest.mark.parametrize(('markup', 'expected'), [
    ('-{zh-cn:内存; zh-tw:記憶體; zh-hk:內存;}-', '記憶體'), ('-{zh-hans:着;\nzh-hant:著;}-', '著'), ('-{zh-hk:的士;zh-cn:出租车}-', '的士'),
    ('-{zh-cn:出租车}-', '出租车'), ('-{H|zh-cn:博客;zh-tw:部落格}-甲', '甲'), ('-{A|zh-cn:博客;zh-tw:部落格}-', '部落格'), ('-{T|zh-tw:題}-', ''),
    ('-{R|裡面}-', '裡面'), ('-{后}-', '后'), ('-{}-', ''), ('-{zh-tw:-{zh-tw:甲;zh-cn:乙}-丙;zh-cn:丁}-', '甲丙'), ('-{zh-tw;zh-hk|原文}-', '原文'),
    ('-{[[A|B]]}-', '[[A|B]]'), ('-{zh-tw:&nbsp;甲;zh-cn:乙}-', '&nbsp;甲'), ('-{{template}}-', '-{{template}}-'), ('-{沒有結尾', '-{沒有結尾'),
    ('A-{甲=>zh-tw:乙;甲=>zh-cn:丙}-', 'A乙'), ('-{D|zh-cn:a;zh-tw:b}-', '')])
def test_variants_are_resolved_for_taiwan(markup, expected):
    assert resolve_variants(markup) == expected

@pytest.mark.parametrize('pack', ['.xml', '.xml.bz2', '.xml.gz'])
def test_a_dump_of_fifty_pages(tmp_path, pack):
    pages = [page(number, f'條目{number}', f"'''條目{number}'''是第{number}個[[條目]]。{{{{box|{{{{inner|[[a]]}}}}}}}}\n{{| \n| 表 \n|}}\n== 節 ==\n內文。") for number in range(40)]
    pages += [page(100, '新高山', '#REDIRECT [[玉山]]', redirect='玉山'), page(101, '舊轉向', '#重定向 [[玉山]]'), page(102, 'Talk:玉山', '討論。', ns=1),
              page(103, 'Template:甲', '模板', ns=10), page(104, '阿里', '阿里可以指：\n{{disambig}}'), page(105, '阿里 (消歧義)', '* 甲'),
              page(106, '空頁', ''), page(107, '程式', 'return', model='Scribunto'), page(108, '改過', '舊的。', '新的。'), page(109, '人名', '{{人名消歧義|}}'),
              page(110, '只有模板', '{{甲}}')]
    data = dump(*pages)
    (tmp_path / f'zhwiki{pack}').write_bytes({'.xml': bytes, '.xml.bz2': lambda b: bz2.compress(b[:5000]) + bz2.compress(b[5000:]), '.xml.gz': gzip.compress}[pack](data))
    documents, dropped = split(read_documents(tmp_path / f'zhwiki{pack}'))
    assert [document['doc_id'] for document in documents] == [f'zhwiki:{number}' for number in [*range(40), 108]]
    assert documents[3]['text'] == '條目3是第3個條目。\n\n## 節\n\n內文。' and documents[40]['text'] == '新的。', documents[3]
    assert {(document['license'], document['source']) for document in documents} == {('CC-BY-SA-4.0', f'zhwiki{pack}')}
    assert [(row['title'], row['drop_reason']) for row in dropped] == [
        ('新高山', 'redirect'), ('舊轉向', 'redirect'), ('Talk:玉山', 'not_article'), ('Template:甲', 'not_article'), ('阿里', 'disambiguation'),
        ('阿里 (消歧義)', 'disambiguation'), ('空頁', 'no_text'), ('程式', 'not_article'), ('人名', 'disambiguation'), ('只有模板', 'no_text')]
    assert dropped[0]['evidence'] == 'to 玉山' and dropped[3]['evidence'] == 'namespace Template'
    assert split(read_documents(tmp_path / f'zhwiki{pack}', license='CC0-1.0', max_documents=1))[0][0]['license'] == 'CC0-1.0'

@pytest.mark.parametrize(('data', 'reason'), [
    (bz2.compress(dump(page(1, '甲', '字。'), page(2, '乙', '字。')) * 50)[:-20], 'unreadable_file'), (dump(page(1, '甲', '字。'))[:-30], 'malformed_xml'),
    (b'<rss/>', 'unknown_format'), (b'', 'malformed_xml'), (b'<!DOCTYPE m [<!ENTITY a "aaaa">]><mediawiki>&a;</mediawiki>', 'malformed_xml'),
    (b'<!DOCTYPE m SYSTEM "http://127.0.0.1:9/x.dtd"><mediawiki/>', 'malformed_xml')], ids=range(6))
def test_damaged_dumps(tmp_path, data, reason):
    path = tmp_path / ('a.xml.bz2' if data[:3] == b'BZh' else 'a.xml')
    path.write_bytes(data)
    assert [row['drop_reason'] for row in split(read_documents(path))[1]][-1:] == [reason]

def test_a_dump_is_never_held_whole(tmp_path):
    with gzip.open(tmp_path / 'a.xml.gz', 'wb', compresslevel=1) as file:
        file.write(dump()[:-len('</mediawiki>')])
        for number in range(300): file.write(page(number, f'條目{number}', *['玉山是山。' * 2000] * 2).encode())
        file.write(b'</mediawiki>')
    tracemalloc.start()
    count = sum(1 for _ in read_dump_records(tmp_path / 'a.xml.gz'))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 300 and peak < 2_000_000, f'{peak:,} bytes for 18 MB of XML'

# Data sets of the hub

def test_hub_options_and_licence(tmp_path):
    (tmp_path / 'README.md').write_text('---\nlicense: [cc-by-sa-4.0, gfdl]\nconfigs:\n- config_name: tw\n  data_files:\n  - split: validation\n    path: tw.jsonl\n'
                                        '- config_name: other\n  data_files: other.jsonl\n---\n')
    (tmp_path / 'tw.jsonl').write_text(json.dumps({'key': 'k1', 'body': MOUNTAIN['text'], 'text': '不要'}))
    (tmp_path / 'other.jsonl').write_text(json.dumps({'text': '別的。'}))
    documents, _ = split(read_documents(f'hf:{tmp_path}?config=tw&split=validation&text=body&id=key'))
    assert [(document['doc_id'], document['text'], document['license']) for document in documents] == [('k1', MOUNTAIN['text'], 'cc-by-sa-4.0, gfdl')]
    for query, problem in (('config=tw&split=train', 'cannot be read'), ('config=other&text=body', 'no column body, but text')):
        with pytest.raises(UserError, match=problem) as error: list(read_documents(f'hf:{tmp_path}?{query}'))
        assert '\n' not in str(error.value)

@pytest.mark.parametrize('location', ['hf:', 'hf:a/b?page=2', 'hf:?split=train'])
def test_mistaken_hub_locations(location):
    with pytest.raises(UserError) as error: list(read_documents(location))
    assert '\n' not in str(error.value)

def test_a_damaged_file_of_a_data_set_is_dropped(tmp_path):
    for name, document in (('a', MOUNTAIN), ('c', RIVER)): pq.write_table(pa.Table.from_pylist([document]), tmp_path / f'{name}.parquet')
    (tmp_path / 'b.parquet').write_bytes((tmp_path / 'a.parquet').read_bytes()[:300] + b'PAR1')
    documents, dropped = split(read_documents(f'hf:{tmp_path}'))
    assert [document['doc_id'] for document in documents] == ['yushan', 'zhuoshui'] and [row['drop_reason'] for row in dropped] == ['unreadable_file']

# Chunks

HARD_TEXTS = ['', '。', '玉山' * 3000, 'a' * 9000, '玉山\u202eעברית العربية؟ mixed 混合。\n' * 50,
              '第一句。\r\n\r\n第二句！\r第三句？' * 30, '\x00\ud83d半\x07句。' * 20,
              '# 標題\n## 小節\n內文在此。\n### 空\n', '「他說：『好。』」然後走了。' * 60, '\u3000\u3000段首空格。\n\n\n' * 40]

@pytest.mark.parametrize('chunk_size', [20, 57, 400])
@pytest.mark.parametrize('text', HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_offsets_and_nothing_lost_on_hard_text(text, chunk_size):
    document = {'text': clean_text(text)}
    assert len(document['text']) == len(text) and clean_text(document['text']) == document['text']
    check_chunks(document, chunk_size)

def check_chunks(document, chunk_size):
    "Check what holds for the chunks of every text."
    text, rows = document['text'], chunk_document(document, chunk_size)
    plain = FENCED.sub(lambda block: ' ' * len(block[0]), text)
    heading = {place for mark in HEADING.finditer(plain) for place in range(*mark.span())}
    sentences = [(start + first, start + last) for start, end, _ in split_sections(text) for first, last in split_sentences(text[start:end])]
    starts, ends = {start for start, _ in sentences}, {end for _, end in sentences}
    inside = [span for span in sentences if text_size(text[slice(*span)]) > chunk_size]
    covered = 0
    for row in rows:
        assert text[row['start']:row['end']] == row['text'] != '', 'the offsets give the chunk'
        assert row['start'] >= covered, 'chunks do not overlap and keep their order'
        assert text_size(row['text']) <= chunk_size, 'the budget holds'
        lost = [place for place in range(covered, row['start']) if not text[place].isspace() and place not in heading]
        assert not lost, f'lost before a chunk: {text[covered:row["start"]]!r}'
        covered = row['end']
        for place, kind in ((row['start'], starts), (row['end'], ends)):
            assert place in kind or any(start < place < end for start, end in inside), 'only a sentence over the budget is cut'
    rest = [place for place in range(covered, len(text)) if not text[place].isspace() and place not in heading]
    assert not rest or rest == list(range(len(text))), 'lost at the end'
    return rows

PIECES = ['玉山是臺灣最高的山', '，', '。', '！？', '……', '「', '」', '（', '）', '\n', '\n\n', ' ', '\t', '\u3000', 'Qdrant', '3,952', 'a' * 50, '.', '. ',
          '\n# 標題\n', '\n## 小節 ##\n', '\n#不是標題\n', '\n```\n', '\n| 峰 | 海拔 |\n', '\n- 項目', '\u202eעברית', '🏔️', '\u200b', '\ufffd', '𠮷', 'é', '“', '”',
          '他說：「', '【id_1】', '\x85', '\u2028']

@pytest.mark.parametrize('seed', range(12))
def test_properties_on_random_texts(seed):
    choice = random.Random(seed)
    for _ in range(60):
        text = clean_text(''.join(choice.choices(PIECES, k=choice.randint(0, 250))))
        check_chunks({'text': text}, choice.choice([20, 33, 80, 400]))

def test_random_characters_of_all_scripts():
    choice = random.Random(7)
    for _ in range(40):
        text = clean_text(''.join(chr(choice.choice([choice.randrange(0x80), choice.randrange(0x3000), choice.randrange(0x110000)]))
                                  for _ in range(300)))
        rows = check_chunks({'text': text}, 50)
        json.dumps(rows, ensure_ascii=False).encode(), pa.Table.from_pylist(rows)

def test_headings_stay_with_their_text():
    text = '開頭。\n# 玉山\n概說。\n## 地形 ##\n主峰。\n### 東峰\n斷崖。\n## 生態\n紅檜。\n# 日月潭\n湖。\n```\n# 註解\n```\n'
    got = [(row['heading'], row['text'].splitlines()[0]) for row in chunk_document({'text': text})]
    assert got == [('', '開頭。'), ('玉山', '概說。'), ('玉山 > 地形', '主峰。'), ('玉山 > 地形 > 東峰', '斷崖。'),
                   ('玉山 > 生態', '紅檜。'), ('日月潭', '湖。')]
    long = chunk_document({'text': '# ' + '很長的一行' * 2000 + '\n內文。'})
    assert all(row['heading'] == '' for row in long) and len(long) > 1, 'what is too long for a heading is text'
    assert [row['text'] for row in chunk_document({'text': '# 只有標題'})] == ['# 只有標題']

def test_paragraphs_are_kept_whole_where_the_budget_allows():
    paragraphs = [f'第{number}段。' + '玉山是臺灣最高的山。' * 8 for number in range(12)]
    rows = chunk_document({'text': '\n\n'.join(paragraphs)}, 200)
    assert all(row['text'].startswith('第') for row in rows) and len(rows) == 6, [row['text'][:9] for row in rows]

def test_quotations_end_with_their_quotation_marks():
    rows = chunk_document({'text': '他說：「今天會下雨。帶傘吧！」然後出門了。' * 30}, 45)
    assert all(row['text'].startswith('他說') and row['text'].endswith('出門了。') for row in rows)

@pytest.fixture(scope='module')
def plain_seconds():
    "What this machine takes to cut two megabytes of plain sentences."
    started = time.process_time()
    list(chunk_documents([{'text': '玉山是臺灣最高的山，主峰的海拔很高。' * 40_000}], []))
    return time.process_time() - started

@pytest.mark.parametrize('text', ['玉山是臺灣最高的山，' * 350_000, '玉' * 3_500_000, 'a' * 10_000_000, '「' * 3_500_000, '。' * 3_500_000,
                                  '玉山是山。' * 700_000, '# 標題\n字\n' * 300_000, '```\n' * 1_000_000, ' ' * 9_999_999 + '山', '.)' * 2_000_000],
                         ids=range(10))
def test_ten_megabytes_of_anything_take_no_quadratic_time(text, plain_seconds):
    started = time.process_time()
    rows = list(chunk_documents([{'text': text}], []))
    assert time.process_time() - started < 100 * plain_seconds, 'many times what plain text of a fifth of its size takes'
    assert rows == [] or max(text_size(row['text']) for row in rows[:50]) <= 400

def test_ids_are_the_same_in_another_process():
    code = ('import json, sys; from kyara.corpus import chunk_documents\n'
            'print(json.dumps([row["id"] for row in chunk_documents(json.load(sys.stdin), [], chunk_size=20)]))')
    documents = [MOUNTAIN, RIVER, RAILWAY, {'title': '重複', 'text': MOUNTAIN['text'] + '\n' + RIVER['text']}]
    found = {subprocess.run([sys.executable, '-c', code], input=json.dumps(documents), capture_output=True, text=True, check=True,
                            env={**os.environ, 'PYTHONHASHSEED': seed}).stdout for seed in '12'}
    assert found == {json.dumps([row['id'] for row in chunk_documents(documents, [], chunk_size=20)]) + '\n'}

def test_no_stumps():
    text = ''.join(f'這是第{number}句話，長短並不相同{"，有時還要再加上一段" * (number % 4)}。' for number in range(200))
    sizes = [text_size(row['text']) for row in chunk_document({'text': text}, 200)]
    assert min(sizes) > 100, sizes

@needs_drcd
def test_offsets_on_drcd(drcd):
    for number, document in enumerate(random.Random(0).sample(drcd, 200)): check_chunks(document, (60, 150, 400)[number % 3])

def test_ids_do_not_depend_on_company():
    alone = [row['id'] for row in chunk_documents([RIVER], [])]
    assert alone == [row['id'] for row in chunk_documents(DOCUMENTS, []) if row['doc_id'] == 'zhuoshui']
    assert point_id(alone[0]) != point_id(alone[0] + '00'), 'a lengthened id is another point'

def test_repeated_passages_are_dropped_with_the_first_one_named():
    dropped = []
    rows = list(chunk_documents([{**RIVER, 'text': RIVER['text'] + '\n' + '同一段話在此重複出現兩次而已。\n' * 2}], dropped, chunk_size=20))
    assert len({row['id'] for row in rows}) == len(rows)
    assert [row['drop_reason'] for row in dropped] == ['duplicate_chunk']

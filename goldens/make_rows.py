"""Files of rows as pandas, polars and datasets write them: make_rows.py OUT (crates/retune-train/tests/goldens/rows).

The Parquet files hold what chats.jsonl and pairs.jsonl say, each in its own types. Needs pandas, polars, pyarrow and datasets 5.
"""
import json, sys, tempfile
import datasets, pandas as pd, polars as pl, pyarrow as pa, pyarrow.parquet as pq

out = sys.argv[1]
call = [{"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}]
tools = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}}}]
chats = [
    {"messages": [{"role": "user", "content": 'A "tree"?'}, {"role": "assistant", "content": "Larch.\n"}], "tools": None},
    {"messages": [{"role": "user", "content": "The tide?"}, {"role": "assistant", "content": None, "tool_calls": call},
                  {"role": "tool", "content": "6 m"}, {"role": "assistant", "content": "6 metres."}], "tools": tools},
]
pairs = [{"prompt": "A tree? ", "completion": "Lärche"}, {"prompt": 'A "moon"? ', "completion": "Io"}]
texts = {key: [row[key] for row in pairs] for key in pairs[0]}


def lines(name, rows):
    with open(f"{out}/{name}", "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


lines("chats.jsonl", chats)
lines("pairs.jsonl", pairs)
# Keys that every message has, as columns of structs: nothing where a message has none.
datasets.Dataset.from_list(chats).to_parquet(f"{out}/chats_structs.parquet")
# Messages of unequal keys, which datasets 5 keeps as JSON text that only the column's type and the features say.
datasets.load_dataset("json", data_files=f"{out}/chats.jsonl", split="train", cache_dir=tempfile.mkdtemp()).to_parquet(f"{out}/chats_json.parquet")
pd.DataFrame(texts).to_parquet(f"{out}/pairs_pandas.parquet")
pl.DataFrame(texts).write_parquet(f"{out}/pairs_polars.parquet")
for width, text, items in [("wide", pa.large_string(), pa.large_list), ("narrow", pa.string(), pa.list_)]:
    turn = pa.struct([("role", text), ("content", text)])
    table = pa.table({"messages": pa.array([chats[0]["messages"]], items(turn))})
    pq.write_table(table, f"{out}/lists_{width}.parquet", compression="gzip")
# JSON text of which the features alone say that it is JSON, and a class by number.
features = {"info": {"features": {"text": {"_type": "Json"}, "label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
table = pa.table({"text": ['"It \\"works\\"."', '"No."'], "label": [1, 0]})
pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), f"{out}/features.parquet")

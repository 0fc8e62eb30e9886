"""What the contact sheet brings for the browser: its style, light and dark, and its script, which sends nothing."""

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f8; --card: #fff; --ink: #1b2126; --soft: #5a6670; --line: #d5dbe0;
  --accent: #0b5f8a; --warn: #fff4d6; --warn-line: #c98a00; --danger: #8f1d1d; --danger-ink: #fff; --good: #dff2e3;
  --good-line: #2c7a3f; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181b; --card: #1e2428; --ink: #e6eaed; --soft: #9aa7b1;
  --line: #364048; --accent: #6fc1ec; --warn: #352a10; --warn-line: #d9a53a; --danger: #7c1f1f; --danger-ink: #fff;
  --good: #17301e; --good-line: #58b06e; } }
* { box-sizing: border-box; }
html { scroll-padding-bottom: 90px; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main, .inside { max-width: 1400px; margin: 0 auto; padding: 0 24px; }
main { padding-bottom: 40px; }
.private { background: var(--danger); color: var(--danger-ink); padding: 10px 0; }
h1 { font-size: 26px; margin: 24px 0 4px; }
h2 { font-size: 20px; margin: 40px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 24px 0 8px; }
small { color: var(--soft); font-weight: normal; font-size: 13px; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 18px; }
.counts { display: flex; flex-wrap: wrap; gap: 12px; list-style: none; margin: 18px 0; padding: 0; }
.counts li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 18px;
  color: var(--soft); min-width: 150px; }
.counts b { display: block; font-size: 24px; color: var(--ink); font-variant-numeric: tabular-nums; }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 4px; padding: 10px 18px;
  margin: 0; }
.warnings ul { margin: 4px 0; padding-left: 20px; }
dl { display: grid; grid-template-columns: minmax(140px, 240px) 1fr; gap: 6px 20px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
dd ul { margin: 4px 0; padding-left: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 18px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; padding-right: 28px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  display: flex; flex-direction: column; content-visibility: auto; contain-intrinsic-size: auto 300px; }
figure.ticked { border-color: var(--good-line); box-shadow: 0 0 0 1px var(--good-line); }
.open { border: 0; padding: 0; background: #000; cursor: zoom-in; display: block; }
.open img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.open:focus-visible { outline-offset: -3px; }
figcaption { padding: 8px 10px; font-size: 13px; flex: 1; }
figcaption ul { list-style: none; margin: 0; padding: 0; color: var(--soft); overflow-wrap: anywhere; }
.caution { color: var(--ink); background: var(--warn); border-radius: 4px; padding: 2px 6px; margin-top: 4px; }
figcaption pre { margin: 4px 0 0; max-height: 220px; overflow: auto; font-size: 11px; white-space: pre-wrap; }
summary { cursor: pointer; color: var(--accent); }
.without { margin-top: 10px; }
.lift { background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 4px; padding: 8px 14px; }
.approve { display: block; padding: 8px 10px; border-top: 1px solid var(--line); cursor: pointer; }
.ticked .approve, dialog .approve.on { background: var(--good); }
.away { position: absolute; left: -9999px; }
.bar { position: sticky; bottom: 0; background: var(--card); border-top: 1px solid var(--line); padding: 10px 0;
  box-shadow: 0 -2px 8px #0003; }
.bar .inside { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; }
button.plain, .file { font: inherit; border: 1px solid var(--accent); color: var(--accent); background: var(--card);
  border-radius: 6px; padding: 6px 14px; cursor: pointer; }
button.strong { background: var(--accent); color: var(--card); }
.file input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.file:focus-within { outline: 3px solid var(--accent); outline-offset: 2px; }
button:disabled { opacity: .5; cursor: default; }
dialog { width: 96vw; height: 96vh; max-width: none; max-height: none; padding: 0; border: 1px solid var(--line);
  border-radius: 8px; background: var(--card); color: var(--ink); }
dialog::backdrop { background: #000b; }
dialog > div { display: flex; flex-direction: column; height: 100%; }
dialog img { flex: 1; min-height: 0; object-fit: contain; background: #000; image-rendering: auto; }
dialog footer { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; padding: 10px 16px; }
dialog .approve { border: 1px solid var(--line); border-radius: 6px; padding: 5px 12px; }
.sign { display: grid; grid-template-columns: 1fr 1fr; gap: 16px 28px; margin-top: 16px; }
.sign label { display: block; color: var(--soft); }
.sign input, .sign textarea { display: block; width: 100%; font: inherit; color: var(--ink); background: transparent;
  border: 0; border-bottom: 1px solid var(--ink); padding: 6px 2px; border-radius: 0; }
.wide { grid-column: 1 / -1; }
.sign .check { color: var(--ink); }
.sign .check input { display: inline; width: auto; margin-right: 8px; }
[hidden] { display: none !important; }
@media (max-width: 700px) { dl, .sign { grid-template-columns: 1fr; } .sheet { grid-template-columns: 1fr 1fr; } }
@media print { :root { color-scheme: light; --ground: #fff; --card: #fff; --ink: #000; --soft: #333; --line: #999;
  --accent: #000; --warn: #fff; --danger: #fff; --danger-ink: #000; }
  .noprint, .sheet, .bar, nav, .without, .lift, dialog { display: none !important; }
  .private { border-bottom: 2px solid #000; } h2 { break-after: avoid; } .card { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
const all = (what, inside = document) => [...inside.querySelectorAll(what)];
const one = (what, inside = document) => inside.querySelector(what);
const ticks = all(".tick"), seen = new Set(), earlier = new Set(), box = one("dialog");
let unsaved = false, place = 0, row = [];

function approved() {
  return [...new Set([...earlier, ...ticks.filter(tick => tick.checked).map(tick => tick.dataset.instance)])].sort();
}
function count() {
  for (const tick of ticks) tick.closest("figure").classList.toggle("ticked", tick.checked);
  const number = approved().length;
  for (const place of all(".approved")) place.textContent = number;
  if (!one(".bar")) return;
  const blind = ticks.filter(tick => tick.checked && !seen.has(tick.closest("figure"))).length;
  one(".blind").textContent = blind ? blind + " of them never opened at full size" : "";
  one(".save").disabled = !number;
}
function set(tick, on) { tick.checked = on; unsaved = true; count(); }
for (const tick of ticks) tick.addEventListener("change", () => set(tick, tick.checked));

function show(number) {
  place = (number + row.length) % row.length;
  const figure = row[place], tick = one(".tick", figure), image = one("img", figure);
  seen.add(figure);
  one("img", box).src = image.src;
  one("img", box).alt = image.alt;
  const said = [one("b", figure), ...all("li", figure)].map(part => part.textContent);
  one(".caption", box).textContent = said.join(" \\u00b7 ");
  one(".of", box).textContent = (place + 1) + " / " + row.length;
  one(".approve", box).hidden = !tick;
  one(".approve", box).classList.toggle("on", Boolean(tick && tick.checked));
  one(".approve input", box).checked = Boolean(tick && tick.checked);
  count();
}
function approve(on) {
  const tick = one(".tick", row[place]);
  if (tick) { set(tick, on); show(place); }
}
document.addEventListener("click", event => {
  const button = event.target.closest(".open");
  if (!button) return;
  row = all("figure", button.closest(".sheet"));
  box.showModal();
  show(row.indexOf(button.closest("figure")));
  one(".close", box).focus();
});
box.addEventListener("close", () => one(".open", row[place]).focus());
box.addEventListener("keydown", event => {
  if (event.key === "ArrowRight") show(place + 1);
  else if (event.key === "ArrowLeft") show(place - 1);
  else if (event.key === "a" && one(".tick", row[place])) approve(!one(".tick", row[place]).checked);
  else return;
  event.preventDefault();
});
one(".close", box).addEventListener("click", () => box.close());
one(".before", box).addEventListener("click", () => show(place - 1));
one(".next", box).addEventListener("click", () => show(place + 1));
one(".approve input", box).addEventListener("change", event => approve(event.target.checked));
one(".print").addEventListener("click", () => print());

if (one(".bar")) {
  one(".save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["instance\\n" + approved().join("\\n") + "\\n"], { type: "text/csv" }));
    link.download = "reviewed.csv";
    link.click();
    unsaved = false;
  });
  one(".file input").addEventListener("change", async event => {
    for (const file of event.target.files)
      for (const name of (await file.text()).match(/\\bi[0-9a-f]{32}\\b/g) || []) earlier.add(name);
    for (const tick of ticks) if (earlier.has(tick.dataset.instance)) tick.checked = true;
    one(".added").textContent = earlier.size + " from earlier files";
    event.target.value = "";
    count();
  });
  addEventListener("beforeunload", event => { if (unsaved) event.preventDefault(); });
}
count();
"""

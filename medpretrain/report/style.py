"""What a report brings for the browser: its style, light and dark, for phones and paper, and a little script."""

STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f8; --card: #fff; --ink: #1b2126; --soft: #56626b; --line: #d5dbe0;
  --accent: #0b5f8a; --warn: #fff4d6; --warn-line: #c98a00; --wash: #eef3f6; --changed: #fdf0d5; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181b; --card: #1e2428; --ink: #e6eaed; --soft: #a3b0ba;
  --line: #364048; --accent: #6fc1ec; --warn: #352a10; --warn-line: #d9a53a; --wash: #262e33; --changed: #3d3218; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 60px; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 0 24px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 30px 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 52px 0 12px; padding-top: 16px; border-top: 2px solid var(--line); }
nav + h2 { margin-top: 8px; border-top: 0; }
h3 { font-size: 17px; margin: 34px 0 8px; overflow-wrap: anywhere; }
h4 { font-size: 15px; margin: 26px 0 8px; }
h5 { font-size: 14px; margin: 0 0 8px; }
p { margin: 8px 0; max-width: 78ch; overflow-wrap: anywhere; }
small { color: var(--soft); font-weight: normal; font-size: 12.5px; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, monospace; font-size: 12.5px; overflow-wrap: anywhere; }
pre { margin: 8px 0 0; white-space: pre-wrap; }
nav { position: sticky; top: 0; z-index: 1; background: var(--ground); border-bottom: 1px solid var(--line);
  display: flex; gap: 4px 18px; padding: 10px 0; overflow-x: auto; white-space: nowrap; }
.lead { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--accent);
  border-radius: 6px; padding: 14px 20px; margin: 14px 0; display: grid; grid-template-columns: auto 1fr;
  gap: 6px 18px; }
.lead dt { color: var(--soft); } .lead dd { margin: 0; overflow-wrap: anywhere; } .lead .main { font-size: 17px; }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 4px; padding: 10px 18px;
  margin: 14px 0; overflow-wrap: anywhere; }
.warnings ul { margin: 4px 0; padding-left: 20px; }
.differs { border-left: 3px solid var(--warn-line); padding: 2px 0 2px 12px; }
.absent { color: var(--soft); font-style: italic; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin: 12px 0; }
figure { margin: 0; min-width: 0; }
.table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  margin: 14px 0; }
.table figcaption { color: var(--ink); margin-bottom: 6px; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; min-width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 15px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:last-child, th:last-child { padding-right: 4px; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: normal; vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; position: sticky; left: 0; background: var(--card); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small, th small { display: block; font-size: 12px; }
.notes { margin: 8px 0 0; padding-left: 18px; color: var(--soft); font-size: 13px; }
.spot { width: 10px; height: 10px; margin-right: 7px; vertical-align: 0; }
.changed { background: var(--changed); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 14px;
  margin: 12px 0; align-items: start; }
.panels.few { grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 400px)); }
.panels.four { grid-template-columns: repeat(auto-fill, minmax(min(272px, 100%), 1fr)); }
.panels.small { grid-template-columns: repeat(auto-fill, minmax(min(210px, 46%), 1fr)); gap: 10px; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  break-inside: avoid; }
.panel.wide { grid-column: 1 / -1; }
.panel img { display: block; width: 100%; height: auto; background: #fff; }
.panel figcaption { padding: 8px 12px 9px; font-size: 13px; color: var(--soft); border-top: 1px solid var(--line); }
.files a { margin-left: 8px; font-size: 12px; }
.choose { display: flex; flex-wrap: wrap; gap: 6px; margin: 10px 0; }
.choose button { font: inherit; font-size: 13px; border: 1px solid var(--line); color: var(--ink);
  background: var(--card); border-radius: 999px; padding: 4px 13px; cursor: pointer; }
.choose button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: var(--card); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); }
.facts { display: grid; grid-template-columns: minmax(130px, 220px) 1fr; gap: 5px 20px; margin: 0; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(430px, 100%), 1fr)); gap: 14px; }
.strips .card { margin: 0; min-width: 0; }
.strip { display: flex; gap: 10px; overflow-x: auto; padding-bottom: 6px; }
.strip figure { flex: 0 0 auto; width: 80px; font-size: 11.5px; line-height: 1.3; color: var(--soft); }
.strip img { display: block; width: 80px; height: 80px; object-fit: contain; background: #000 padding-box;
  border-radius: 4px; border: 3px solid transparent; }
.strip .query img { border-color: var(--accent); }
.strip .right img { border-color: #009E73; } .strip .wrong img { border-color: #D55E00; }
.strip figcaption { overflow-wrap: anywhere; padding-top: 3px; }
footer { margin-top: 50px; border-top: 1px solid var(--line); padding-top: 12px; color: var(--soft); font-size: 13px; }
[hidden] { display: none; }
@media (max-width: 700px) {
  main { padding: 0 14px 40px; } h1 { font-size: 23px; }
  .lead { grid-template-columns: 1fr; gap: 1px; padding: 12px 14px; }
  .lead dd { margin-bottom: 8px; } .facts { grid-template-columns: 1fr; gap: 1px; } .facts dd { margin-bottom: 7px; }
  tbody th { white-space: normal; min-width: 118px; max-width: 150px; font-size: 13px; overflow-wrap: break-word; }
  td { min-width: 64px; } td:not(.number) { min-width: 120px; }
  .table { padding: 10px 12px; } .lead .main { font-size: 16px; }
}
@media print {
  :root { color-scheme: light; --ground: #fff; --card: #fff; --ink: #000; --soft: #333; --line: #bbb; --accent: #00425f;
    --warn: #fff; --wash: #fff; --changed: #eee; }
  @page { margin: 14mm; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; }
  nav, .choose, .files { display: none !important; }
  [hidden] { display: revert !important; } .panel[hidden] { display: block !important; }
  h2, h3, h4 { break-after: avoid; } tr, .panel, .strip { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: 8pt; }
  td small, th small { font-size: 6.5pt; } th, td { padding: 3px 7px 3px 0; }
  tbody th, .number { white-space: normal; } .strip { flex-wrap: wrap; overflow: visible; }
  .panels, .panels.few, .panels.four { grid-template-columns: 1fr 1fr; }
  .panels.small { grid-template-columns: 1fr 1fr 1fr; } tbody th { position: static; }
  a { color: inherit; text-decoration: none; }
}
"""

# Without it every panel is shown; so it is on paper.
SCRIPT = """
"use strict";
for (const group of document.querySelectorAll("[data-choose]")) {
  const panels = [...group.querySelectorAll("[data-choice]")];
  const names = [...new Set(panels.map(panel => panel.dataset.choice))];
  if (names.length < 2) continue;
  const bar = document.createElement("div"), buttons = [];
  bar.className = "choose";
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", group.dataset.choose);
  const show = name => {
    for (const panel of panels) panel.hidden = name !== "" && panel.dataset.choice !== name;
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.name === name);
  };
  for (const name of [...names, ""]) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.name = name;
    button.textContent = name || "all";
    button.addEventListener("click", () => show(name));
    buttons.push(button);
    bar.append(button);
  }
  group.before(bar);
  show(group.dataset.first === "all" ? "" : names[0]);
}
const folded = () => document.querySelectorAll("details:not([open])");
addEventListener("beforeprint", () => { for (const one of folded()) { one.open = true; one.dataset.folded = ""; } });
addEventListener("afterprint", () => {
  for (const one of document.querySelectorAll("details[data-folded]")) { one.open = false; delete one.dataset.folded; }
});
"""

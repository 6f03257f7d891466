"""Style sheet and script of the page."""

CSS = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1d2127; --soft: #626a76; --line: #dfe3e8;
  --accent: #0072b2; --bar: rgba(0, 114, 178, .2); --bad: #b3261e; --mark: #eef3f7; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e6e9ed; --soft: #98a1ad;
  --line: #30363e; --accent: #6bb8e6; --bar: rgba(86, 180, 233, .3); --bad: #ff8a80; --mark: #232a32; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 34px 0 10px; }
.soft, small { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 9px; font-size: .92rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { font-weight: 600; font-size: .8rem; line-height: 1.3; vertical-align: bottom; white-space: normal; }
th button { all: unset; cursor: pointer; color: var(--soft); }
th button:hover, th[aria-sort] button { color: var(--accent); }
th button:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.text { text-align: left; }
td.text { max-width: 26rem; overflow: hidden; text-overflow: ellipsis; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
tbody tr:hover td { background: var(--mark); }
tr.dense td:first-child { font-weight: 600; box-shadow: inset 3px 0 var(--ink); }
td.missing { color: var(--soft); }
td.bar { min-width: 110px; background: linear-gradient(90deg, var(--bar) var(--share), transparent var(--share)); }
tbody tr:hover td.bar { background: linear-gradient(90deg, var(--bar) var(--share), var(--mark) var(--share)); }
td.failed { color: var(--bad); text-align: left; white-space: normal; min-width: 15rem; overflow-wrap: anywhere; }
.lead { margin: 0 0 16px; overflow-wrap: anywhere; }
details.legend { margin: 8px 2px 0; font-size: .85rem; }
details.legend > * { border: 0; padding: 4px 0; font-weight: 400; }
figure.card { margin: 0; padding: 14px; background: #fff; overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
@media (prefers-color-scheme: dark) { figure.card { filter: brightness(.9); } }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; padding: 14px 16px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
dl.scores { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); font-size: .85rem; gap: 2px 24px; }
dl.scores div { display: flex; justify-content: space-between; gap: 12px; }
dl.scores dt { overflow-wrap: anywhere; }
pre { margin: 10px 0 0; padding: 12px 16px; overflow-x: auto; font-size: .85rem; }
details { margin: 0 0 10px; }
summary { cursor: pointer; padding: 10px 16px; font-weight: 600; overflow-wrap: anywhere; }
summary small { font-weight: 400; margin-left: 8px; }
details.card > *:not(summary), details.card details > *:not(summary) { border-top: 1px solid var(--line); }
details details { margin: 0; }
details pre { margin: 0; }
ul { margin: 0; padding: 12px 16px 12px 34px; overflow-wrap: anywhere; }
@media (max-width: 640px) { body { font-size: 14px; } main { padding: 18px 12px 40px; } th, td { padding: 7px 8px; }
  figure.card { padding: 8px; } figure img { max-width: none; width: 620px; }
  dl:not(.scores) { grid-template-columns: 1fr; gap: 0; } dl:not(.scores) dd { margin-bottom: 8px; }
  td.text { max-width: 11rem; } }
@media print { body { background: #fff; } .scroll { overflow: visible; } }
"""

# Sorting is stable, and rows without a value stay at the end in either direction.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const first = head.classList.contains("text") ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = row => row.cells[column]?.dataset.value ?? "";
    const compare = head.classList.contains("text") ? (a, b) => a.localeCompare(b, undefined, {numeric: true})
                                                     : (a, b) => Number(a) - Number(b);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
    });
    table.tBodies[0].append(...rows);
  }));
}
"""

"""How a page looks: light or dark as the reader's screen is set, on a telephone, on a wide screen and on paper."""

STYLE = """
:root {
  --ground: #fff; --text: #1c1c1c; --soft: #5a5a5a; --rule: #d8d8d8;
  --one: #0b62a8; --two: #b04300; --mark: #fff0cc; --mark-text: #533700;
}
@media screen {
  :root { color-scheme: light dark; }
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ground: #15171b; --text: #e9e9e9; --soft: #abb0b8; --rule: #3b4048;
    --one: #6cb6ff; --two: #ffb077; --mark: #463410; --mark-text: #ffe3ab;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 100rem; margin: 0 auto; padding: 1rem clamp(1rem, 3vw, 3rem) 3rem;
  background: var(--ground); color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { margin: 0.5rem 0 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.2rem 0 0.6rem; font-size: 1.2rem; border-bottom: 1px solid var(--rule); }
h3 { margin: 1.4rem 0 0.3rem; font-size: 1rem; }
p { margin: 0.3rem 0; max-width: 60rem; }
.model, .note, figcaption, footer { color: var(--soft); }
.labels { margin: 0.8rem 0; padding: 0; list-style: none; }
.labels li {
  display: inline-block; margin: 0 0.5rem 0.5rem 0; padding: 0.2rem 0.7rem; border-radius: 0.3rem;
  border: 1px solid currentColor; background: var(--mark); color: var(--mark-text); font-weight: 600;
}
.state { font-size: 1.1rem; }
.side-by-side { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: 0.85rem; }
svg { display: block; width: 100%; max-width: 40rem; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); }
svg .y, svg .step { text-anchor: end; }
svg .x { text-anchor: middle; }
svg .grid, svg .tick { stroke: var(--rule); }
svg polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg polyline.one { stroke: var(--one); }
svg polyline.two { stroke: var(--two); stroke-dasharray: 6 3; }
svg circle.one { fill: var(--one); }
svg circle.two { fill: var(--two); }
.key { font-weight: 600; }
.key.one { color: var(--one); }
.key.two { color: var(--two); }
img { display: block; max-width: 100%; height: auto; background: #fff; }
.large img { width: 100%; max-width: 70rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; }
thead th { overflow-wrap: normal; }
tbody th { font-weight: 400; color: var(--soft); }
caption { padding-bottom: 0.3rem; text-align: left; color: var(--soft); }
.classes { max-width: 60rem; }
.classes thead th { overflow-wrap: normal; }
.classes td { font-variant-numeric: tabular-nums; }
.bar, .matrix td::before { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.classes td:nth-child(3) { white-space: nowrap; }
.bar {
  display: inline-block; width: clamp(1.5rem, 8vw, 6rem); height: 0.7rem; margin-right: 0.6rem;
  border: 1px solid var(--rule);
}
.bar span { display: block; height: 100%; background: var(--one); }
.matrix { width: auto; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.matrix caption span { display: inline-block; max-width: calc(100vw - 3rem); }
.matrix th, .matrix td { padding: 0.2rem 0.4rem; white-space: nowrap; }
.matrix thead th, .corner { vertical-align: bottom; }
.matrix thead th span { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg); }
.matrix td { position: relative; isolation: isolate; min-width: 2.6rem; text-align: right; }
.matrix .zero, .matrix .corner { color: var(--soft); }
.matrix td::before { content: ""; position: absolute; inset: 0; z-index: -1; opacity: calc(0.45 * var(--heat, 0)); }
.matrix .right::before { background: var(--one); }
.matrix .wrong::before { background: var(--two); }
summary { margin: 0.6rem 0; cursor: pointer; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
footer { margin-top: 3rem; font-size: 0.85rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .side-by-side { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; }
  .matrix { font-size: 7pt; break-inside: avoid; }
  .matrix td { min-width: 0; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
}
"""

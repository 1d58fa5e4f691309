"""The report's style sheet. Series colours are Okabe and Ito's, which most eyes tell apart."""

CSS = """
:root { color-scheme: light dark; --bg: #fbfbf9; --ink: #1c1e21; --soft: #5d636b; --rule: #dcdedf;
  --card: #ffffff; --good: #00714f; --bad: #b3261e; --warn: #8a5a00;
  --c0: #0072b2; --c1: #d98200; --c2: #009e73; --c3: #7d8288; --c4: #cc79a7; --c5: #56b4e9;
  --c6: #d55e00; --c7: #a89b00; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --ink: #e8eaed; --soft: #a2a8b0;
  --rule: #34383f; --card: #1b1e23; --good: #4fd1a1; --bad: #ff8a80; --warn: #ffc766;
  --c0: #5ab4ea; --c1: #f0a63a; --c2: #2fcf9f; --c3: #9aa0a8; --c4: #e59fc6; --c5: #8fd0f7;
  --c6: #ff8f4d; --c7: #d8cb3a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 18px 80px; }
h1 { font-size: 1.75rem; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 1.3rem; margin: 52px 0 8px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 1.02rem; margin: 26px 0 6px; }
p, li { max-width: 76ch; }
.sub, .note, caption, figcaption { color: var(--soft); }
.sub { margin: 0 0 20px; } .note { font-size: 0.88rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.9rem; margin-bottom: 20px; }
a { color: var(--c0); }
.verdict { background: var(--card); border: 1px solid var(--rule); border-left: 6px solid var(--c3);
  border-radius: 8px; padding: 16px 20px 8px; }
.verdict.disaggregate { border-left-color: var(--good); }
.verdict.do-not-disaggregate { border-left-color: var(--bad); }
.verdict.depends { border-left-color: var(--warn); }
.verdict .headline { font-size: 1.15rem; font-weight: 600; margin: 0 0 8px; max-width: none; }
.verdict ul { padding-left: 20px; margin: 8px 0; } .verdict li { margin: 6px 0; }
li.good::marker, .good { color: var(--good); } li.bad::marker, .bad { color: var(--bad); }
li.good, li.bad { color: inherit; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 18px; align-items: start; margin: 14px 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 12px 8px; }
figcaption { font-size: 0.9rem; margin-bottom: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 0.82rem; margin-bottom: 4px; }
.key { white-space: nowrap; } .swatch { display: inline-block; width: 14px; height: 10px;
  border-radius: 2px; margin-right: 5px; background: currentColor; }
.swatch.dashed { background: repeating-linear-gradient(90deg, currentColor 0 4px, #0000 4px 7px); }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } .tick { fill: var(--soft); } .label { fill: var(--soft); }
.mid { text-anchor: middle; } .end { text-anchor: end; } .value { font-size: 10.5px; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; } .bar { stroke: currentColor; stroke-width: 1.5; }
.dot { fill: currentColor; } .loose { fill: none; stroke: currentColor; stroke-width: 1.3; }
.fill { fill: currentColor; } .whisker { stroke: var(--ink); stroke-width: 1.3; }
.mark { fill: var(--ink); } .on-bar { fill: #fff !important; font-size: 11px; }
.first-token { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.k-route { color: #7d8288; } .k-wait { color: #a3a8ae; } .k-prefill { color: #0072b2; }
.k-transfer { color: #c66a00; } .k-decode { color: #00805d; } .k-stream { color: #a8578a; }
.k-return { color: #a8578a; } .k-gpu { color: #8a7a00; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 6px; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }
th { font-weight: 600; border-bottom-color: var(--soft); }
td.num, th.num { text-align: right; white-space: nowrap; padding-left: 10px; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 10px 12px; overflow-x: auto; font-size: 0.84rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: 0.92em; } details { margin: 12px 0; } summary { cursor: pointer; }
.flag { display: inline-block; padding: 0 8px; border-radius: 9px; font-size: 0.8rem;
  border: 1px solid currentColor; }
.flag.error { color: var(--bad); } .flag.warning { color: var(--warn); }
.flag.ok, .flag.info { color: var(--good); }
.empty { color: var(--soft); font-style: italic; }
.scroll caption { max-width: min(76ch, calc(100vw - 40px)); position: sticky; left: 0; }
@media (max-width: 560px) { svg { font-size: 17px; } .value { font-size: 14px; }
  .on-bar { display: none; } main { padding: 16px 12px 60px; } }
@media print { nav { display: none; } figure, table { break-inside: avoid; } }
"""

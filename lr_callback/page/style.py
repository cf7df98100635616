"""Style: how a page looks, light and dark, on a phone and on paper."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --ground: #f5f6f8; --paper: #ffffff; --text: #1c2330; --quiet: #566072; --line: #dde1e8; --accent: #2f5bb7;
  --good: #17703c; --bad: #b3261e; --bar: #c9d6f2; --code: #eef1f6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #12151b; --paper: #1b2029; --text: #e6e9ef; --quiet: #a3adbd; --line: #323a47; --accent: #8fb0f5;
    --good: #6fd196; --bad: #ff9b92; --bar: #33456b; --code: #252c38;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p { margin: 0 0 .75rem; max-width: 48rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: .75rem; }
.card, .box, figure, .note { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; }
.card { padding: .7rem .8rem; margin: 0; }
.card dt { color: var(--quiet); font-size: .85rem; }
.card dd { margin: 0; }
.card { font-variant-numeric: tabular-nums; }
.card .now { font-size: clamp(1.2rem, 4.5vw, 1.45rem); font-weight: 650; line-height: 1.3; }
.card .was { color: var(--quiet); font-size: .85rem; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.note { border-left: .3rem solid var(--accent); padding: .8rem 1rem; margin: 1rem 0; }
.note p:last-child { margin: 0; }
.box { overflow: auto; max-width: 100%; margin: 0 0 1rem; }
.tall { max-height: 34rem; }
.box:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; vertical-align: top; }
th[scope=col] {
  position: sticky; top: 0; background: var(--paper); color: var(--quiet); font-weight: 600;
  border-bottom: 1px solid var(--line);
}
thead td { border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th[scope=row], .text { text-align: left; font-weight: 500; }
th[scope=row] { white-space: normal; min-width: 9rem; max-width: 24rem; }
.dense > * { color: var(--quiet); }
.bar {
  min-width: 7rem;
  background: linear-gradient(var(--bar), var(--bar)) no-repeat left .8rem center;
  background-size: calc((100% - 1.6rem) * var(--part)) 70%;
}
.plain td { white-space: normal; text-align: left; }
.plain th[scope=row] { color: var(--quiet); width: 34%; min-width: 6rem; max-width: 14rem; }
figure { margin: 0 0 1rem; padding: 1rem; }
figure .box { border: 0; margin: .6rem 0; }
figure svg { display: block; width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { figure svg { filter: invert(.92) hue-rotate(180deg); } }
figcaption { max-width: 48rem; }
pre { margin: 0; padding: .8rem 1rem; font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre.box { background: var(--code); margin-bottom: 1rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: 0 0 1rem; }
summary { cursor: pointer; color: var(--accent); }
ul { padding-left: 1.2rem; margin: 0 0 1rem; max-width: 56rem; }
li { margin: .2rem 0; }
@media screen and (min-width: 62rem) {
  .figures { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; }
  .figures > :nth-child(n + 3), .figures > :only-child { grid-column: 1 / -1; }
}
@media (max-width: 66rem) {
  th, td { padding: .35rem .5rem; }
  th[scope=row] { min-width: 7.5rem; }
  .bar { min-width: 5.5rem; background-position: left .5rem center; }
  .bar { background-size: calc((100% - 1rem) * var(--part)) 70%; }
}
@media (max-width: 40rem) {
  .stages thead { display: none; }
  .stages, .stages tbody, .stages tr { display: block; }
  .stages tr { padding: .35rem .5rem; }
  .stages tr + tr { border-top: 1px solid var(--line); }
  .stages tr > * { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0; }
  .stages th[scope=row] { max-width: none; font-weight: 600; }
  .stages td { white-space: normal; }
  .stages td::before { content: attr(data-stage); color: var(--quiet); text-align: left; }
}
@media print {
  :root {
    --ground: #ffffff; --paper: #ffffff; --text: #000000; --quiet: #444444; --line: #bbbbbb; --code: #ffffff;
    --good: #17703c; --bad: #b3261e; --bar: #d5dff5; --accent: #2f5bb7;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0 1px; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .5rem; }
  .card .now { font-size: 1.2rem; }
  .box, .tall { overflow: visible; max-height: none; }
  .tall table { font-size: 8pt; }
  .tall :is(th, td) { padding: .2rem .4rem; }
  .bar { min-width: 3.5rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  th[scope=col] { position: static; }
  figure svg { min-width: 0 !important; max-width: calc(var(--points) * 1.2px) !important; max-height: 20cm; }
  figure svg { filter: none; }
  pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; display: block; }
  figure, .card, .note, .plain, pre, tr { break-inside: avoid; }
  h2, h2 + .quiet, p:has(+ pre), summary { break-after: avoid; }
}
"""

"""The style sheet of the page, for wide and narrow windows, light and dark."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#586474;--line:#dde3ea;--paper:#fff;--card:#f7f9fb;--blue:#2b6cb0;
--proved:#1a7f4b;--refuted:#c02a1e;--unknown:#8a5a00;--vacuous:#7a3ea3;--warn:#fff6e0;--warn-line:#e3b341}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ef;--soft:#9aa7b5;--line:#2f3945;--paper:#12171d;--card:#191f27;
--blue:#4a8fd6;--proved:#56c98b;--refuted:#ff8a80;--unknown:#e8b84a;--vacuous:#c99af0;--warn:#2c2410;--warn-line:#8a6d1f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:2.5rem 2rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:.1rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.6rem 0 .9rem}
h3{font-size:1rem;margin:0 0 .9rem;overflow-wrap:anywhere}
p{margin:0}
.eyebrow{color:var(--soft);font-size:.78rem;letter-spacing:.06em;text-transform:uppercase}
.lead,small,figcaption,dt,th{color:var(--soft)}
small{display:block;font-size:.82rem;overflow-wrap:anywhere}
code,pre{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.warnings{margin-top:1.2rem;padding:.7rem 1rem;background:var(--warn);border:1px solid var(--warn-line);border-radius:.5rem}
.badge{display:inline-block;padding:.02rem .5rem;border-radius:1rem;border:1px solid currentColor;
font:700 .72rem/1.5 system-ui,"DejaVu Sans",sans-serif;letter-spacing:.03em;white-space:nowrap}
.proved{color:var(--proved)}.refuted{color:var(--refuted)}.unknown{color:var(--unknown)}.vacuous{color:var(--vacuous)}
table{border-collapse:collapse;table-layout:fixed;width:100%;font-size:.92rem;overflow-wrap:anywhere}
th{text-align:left;font-weight:600;font-size:.8rem}
th,td{padding:.55rem 1.2rem .55rem 0;vertical-align:top;border-bottom:1px solid var(--line)}
th:nth-child(1){width:23%}th:nth-child(2){width:9.5%}th:nth-child(3){width:21.5%}th:nth-child(4){width:18%}th:nth-child(5){width:10%}
td:last-child,th:last-child{padding-right:0}
article{margin:0 0 1.2rem;padding:1.1rem 1.3rem 1.3rem;background:var(--card);border:1px solid var(--line);border-radius:.7rem}
.card{display:flex;flex-wrap:wrap;gap:1.2rem 2.2rem}
.pictures{display:flex;flex-wrap:wrap;gap:1rem 1.6rem;max-width:66rem}
figure{margin:0;width:15rem}
figcaption{display:flex;flex-direction:column;margin-top:.3rem;font-size:.82rem;overflow-wrap:anywhere}
.mask{display:block;width:100%;height:auto}
.mask text{font:8px system-ui,"DejaVu Sans",sans-serif;fill:var(--soft)}
.mask .axis{font-size:9px}.mask .value{font-size:6.5px}
.ground{fill:var(--paper)}.mask .allowed{fill:var(--blue)}
.grid{stroke:var(--card);stroke-width:.7;fill:none}.frame{fill:none;stroke:var(--soft);stroke-width:1}
circle.differs{fill:var(--refuted);stroke:var(--paper);stroke-width:.6}
rect.witness{fill:none;stroke:var(--refuted);stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;width:0;min-width:100%;margin:.6rem 0 0;padding:0;
list-style:none;font-size:.82rem;color:var(--soft)}
.legend i{display:inline-block;width:.8rem;height:.8rem;margin-right:.4rem;vertical-align:-.08rem;background:var(--paper);
border:1px solid var(--soft)}
.legend .allowed{background:var(--blue)}
.legend .differs{border-radius:50%;width:.6rem;height:.6rem;vertical-align:0;background:var(--refuted);border:0}
.legend .witness{border:2px solid var(--refuted);border-radius:.15rem}
dl{flex:1 1 24rem;min-width:0;display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.45rem 1.3rem;margin:0;
font-size:.92rem;align-content:start;align-items:baseline}
dd{margin:0;overflow-wrap:anywhere}
dd p+p{margin-top:.35rem}
pre{margin:0;white-space:pre-wrap;max-height:18rem;overflow:auto}
.source{padding:0 .4rem;border-radius:.3rem;border:1px solid var(--line);color:var(--soft);font-size:.78rem;white-space:nowrap}
@media (max-width:60rem){
thead{display:none}
table,tbody{display:block}
tr{display:block;padding:.7rem 0;border-bottom:1px solid var(--line)}
td{display:grid;grid-template-columns:5.5rem minmax(0,1fr);column-gap:.8rem;padding:.12rem 0;border:0}
td::before{content:attr(data-label);color:var(--soft);font-size:.8rem;grid-row:1/4}
td>*{grid-column:2;justify-self:start}
td:empty{display:none}
}
@media (max-width:46rem){
body{padding:1.4rem 1rem 3rem}
h1{font-size:1.35rem}
article{padding:.9rem 1rem 1rem}
dl{grid-template-columns:minmax(0,1fr);gap:.1rem;flex-basis:100%}
dd{margin-bottom:.6rem}
figure{width:min(100%,17rem)}
}
"""

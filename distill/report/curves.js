// --- Learning curves -----------------------------------------------------------------------------

const MARKS = [
  'M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z', 'M-3.6 -3.6H3.6V3.6H-3.6Z', 'M0 -5L4.7 3.5H-4.7Z',
  'M0 -5L5 0L0 5L-5 0Z', 'M0 5L4.7 -3.5H-4.7Z',
];
const STAR = 'M0 -8L2 -2.6L7.6 -2.5L3.2 1L4.7 6.5L0 3.3L-4.7 6.5L-3.2 1L-7.6 -2.5L-2 -2.6Z';
const HEIGHT = 250, LEFT = 44, RIGHT = 22, TOP = 12, BOTTOM = 38; // pixels
const hidden = new Set(); // students

const colour = student => `s${student % 8}`;
const mark = student => MARKS[student % MARKS.length];
const swatch = student => svg(`svg.swatch.${colour(student)}`,
  {width: 14, height: 14, viewBox: '-7 -7 14 14', 'aria-hidden': 'true'},
  path('marker', mark(student)));

function short(value) {
  const [size, unit] = [[1e12, 'T'], [1e9, 'B'], [1e6, 'M'], [1e3, 'k'], [1, '']]
    .find(([size]) => value >= size || size === 1);
  return `${+(value / size).toPrecision(3)}${unit}`;
}

function ticks([low, high], most) {
  const raw = (high - low) / most;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 2.5, 5, 10].find(m => m * size >= raw * 0.999);
  const made = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++)
    made.push(Number((i * step).toPrecision(12)));
  return made;
}

function setUpCurves() {
  const metrics = unique(DATA.panels.map(panel => panel.metric));
  $('metric').append(...metrics.map(name => el('option', {value: name}, name)));
  $('metric-label').hidden = metrics.length < 2;
  $('metric').addEventListener('change', () => {
    change({metric: $('metric').value});
    drawCurves();
  });
  for (const button of document.querySelectorAll('[data-x]')) {
    button.addEventListener('click', () => {
      change({x: button.dataset.x});
      drawCurves();
    });
  }
  const sample = (text, ...children) => el('span', svg('svg.told',
    {width: 24, height: 16, viewBox: '-12 -8 24 16', 'aria-hidden': 'true'}, ...children), text);
  const taught = DATA.panels.some(panel => panel.teacher !== null);
  $('legend').append(
    ...DATA.students.map((name, i) => el('button', {
      type: 'button', 'aria-pressed': 'true', title: 'show or hide',
      click: event => {
        if (!hidden.delete(i)) hidden.add(i);
        event.currentTarget.setAttribute('aria-pressed', String(!hidden.has(i)));
        drawCurves();
      },
    }, swatch(i), name)),
    sample('95 % interval', path('band', 'M-12 -6H12V6H-12Z'), path('curve', 'M-12 0H12')),
    sample('chosen by validation', path('marker', MARKS[0]), svg('circle.ring', {r: 7})),
    sample('test at the chosen step', path('star', STAR)),
    ...(taught ? [sample('teacher', path('told', 'M-12 0H12'))] : []),
  );
  let width = 0;
  new ResizeObserver(() => {
    if ($('panels').clientWidth === width) return;
    width = $('panels').clientWidth;
    drawCurves();
  }).observe($('panels'));
}

function drawCurves() {
  const metrics = [...$('metric').options].map(option => option.value);
  const metric = metrics.includes(state.metric) ? state.metric : metrics[0];
  $('metric').value = metric;
  for (const button of document.querySelectorAll('[data-x]'))
    button.setAttribute('aria-pressed', String(button.dataset.x === state.x));
  const panels = DATA.panels.filter(panel => panel.metric === metric);
  $('panels').replaceChildren(...panels.map(panel => el('figure',
    el('figcaption', panel.name, el('small', `${panel.metric}, ${panel.split}`)))));
  panels.forEach((panel, i) => drawPanel($('panels').children[i], panel));
}

function drawPanel(figure, panel) {
  const tokens = state.x === 'tokens';
  const pointOf = values => values &&
    {x: values[tokens ? 1 : 0], step: values[0], value: values[2], low: values[3], high: values[4]};
  const known = point => point !== null && point.x !== null;
  const lines = panel.lines.filter(line => !hidden.has(line.student)).map(line => ({
    ...line,
    points: line.points.map(pointOf).filter(known),
    tests: [pointOf(line.test)].filter(known),
  })).filter(line => line.points.length);
  if (!lines.length) {
    figure.append(el('p.note', tokens ? 'Training tokens are not known.' : 'Nothing to show.'));
    return;
  }

  // Scales
  const every = lines.flatMap(line => [...line.points, ...line.tests]);
  const xs = every.map(point => point.x);
  const ys = [panel.teacher, ...every.flatMap(point => [point.value, point.low, point.high])]
    .filter(value => value !== null);
  const width = Math.max(240, figure.clientWidth);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  if (x0 < x1 / 2) x0 = 0;
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  const [floor, ceiling] = y0 >= 0 && y1 <= 1 ? [0, 1] : [-Infinity, Infinity];
  const margin = 0.06 * (y1 - y0) || 0.05;
  [y0, y1] = [Math.max(floor, y0 - margin), Math.min(ceiling, y1 + margin)];
  const X = x => LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT);
  const Y = y => HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  const through = points => 'M' + points.map(p => p.map(v => v.toFixed(1)).join(' ')).join('L');
  const text = (x, y, anchor, shown, name = 'text') =>
    svg(name, {x, y, 'text-anchor': anchor}, shown);

  // From the back to the front: axes, bands, the teacher, curves, test values
  const parts = [];
  for (const y of ticks([y0, y1], 5)) {
    parts.push(path('grid', `M${LEFT} ${Y(y)}H${width - RIGHT}`));
    parts.push(text(LEFT - 8, Y(y) + 4, 'end', String(y)));
  }
  for (const x of ticks([x0, x1], 5)) {
    parts.push(path('axis', `M${X(x)} ${HEIGHT - BOTTOM}v4`));
    parts.push(text(X(x), HEIGHT - BOTTOM + 17, 'middle', short(x)));
  }
  parts.push(path('axis', `M${LEFT} ${HEIGHT - BOTTOM}H${width - RIGHT}`));
  const over = tokens ? 'training tokens' : 'step';
  parts.push(text((LEFT + width - RIGHT) / 2, HEIGHT - 4, 'middle', over));
  for (const line of lines) {
    const points = line.points.filter(sure);
    const upper = points.map(p => [X(p.x), Y(p.high)]);
    const lower = points.map(p => [X(p.x), Y(p.low)]).reverse();
    if (points.length > 1)
      parts.push(path(`band.${colour(line.student)}`, through([...upper, ...lower]) + 'Z'));
  }
  if (panel.teacher !== null) {
    const y = Y(panel.teacher);
    parts.push(path('told', `M${LEFT} ${y}H${width - RIGHT}`));
    const label = `teacher ${number(panel.teacher)}`;
    parts.push(text(LEFT + 6, y > TOP + 16 ? y - 5 : y + 14, 'start', label, 'text.halo'));
  }
  const at = (point, ...children) =>
    svg('g', {transform: `translate(${X(point.x)} ${Y(point.value)})`}, ...children);
  const whisker = point => {
    if (!sure(point)) return null;
    const [low, high] = [point.low, point.high].map(v => Y(v) - Y(point.value));
    return path('whisker', `M0 ${low}V${high}M-3 ${low}h6M-3 ${high}h6`);
  };
  for (const line of lines) {
    const curve = path('curve', through(line.points.map(p => [X(p.x), Y(p.value)])));
    parts.push(svg(`g.${colour(line.student)}`, curve, ...line.points.map(point => at(point,
      line.points.length === 1 ? whisker(point) : null,
      path('marker', mark(line.student)),
      point.step === line.best ? svg('circle.ring', {r: 7.5}) : null,
    ))));
  }
  for (const line of lines) {
    // A little to the right, or it would hide the point of the same step.
    parts.push(svg(`g.${colour(line.student)}`, {transform: 'translate(11 0)'},
      ...line.tests.map(point => at(point, whisker(point), path('star', STAR)))));
  }
  const rule = path('rule', '');
  const picture = svg('svg', {
    width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, tabindex: 0, role: 'img',
    'aria-label': `${panel.name}: ${panel.metric} over ${over}; arrow keys read values`,
  }, ...parts, rule);
  const tip = el('div.tip', {role: 'status', hidden: true});
  figure.append(picture, tip);

  // Values under the pointer, or by arrow keys
  const stops = unique(lines.flatMap(line => line.points.map(p => p.x))).sort((a, b) => a - b);
  let shown = -1;
  function read(stop) {
    shown = stop;
    tip.hidden = stop < 0;
    rule.setAttribute('d', stop < 0 ? '' : `M${X(stops[stop])} ${TOP}V${HEIGHT - BOTTOM}`);
    if (stop < 0) return;
    const x = stops[stop];
    const rows = lines.flatMap(line => line.points.filter(p => p.x === x).map(p => el('tr',
      el('td.l', swatch(line.student), DATA.students[line.student]),
      el('td', number(p.value)), el('td.note', interval(p)),
      el('td', line.tests.filter(t => t.x === x).map(t => `test ${number(t.value)}`).join('')),
    )));
    tip.replaceChildren(tokens ? `${grouped(x)} tokens` : `step ${grouped(x)}`,
      el('table', el('tbody', ...rows)));
    const room = figure.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, X(x) - tip.offsetWidth / 2))}px`;
    tip.style.top = `${figure.clientHeight - 16}px`;
  }
  picture.addEventListener('pointermove', event => {
    const x = event.clientX - picture.getBoundingClientRect().left;
    const away = stops.map(stop => Math.abs(X(stop) - x));
    read(away.indexOf(Math.min(...away)));
  });
  picture.addEventListener('pointerleave', () => read(-1));
  picture.addEventListener('blur', () => read(-1));
  picture.addEventListener('keydown', event => {
    const last = stops.length - 1;
    const next = {
      ArrowLeft: shown < 0 ? last : Math.max(0, shown - 1), ArrowRight: Math.min(last, shown + 1),
      Escape: -1,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    read(next);
  });
}

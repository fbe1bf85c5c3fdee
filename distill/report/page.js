// The page's base: elements, the state in the address, tables. curves.js and examples.js follow it
// in one script.
//
// Text of data sets and models is only ever given to `append`, `textContent` and to attributes that
// hold text; nothing is parsed as HTML.
'use strict';
const DATA = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id);

// make('p.note', {title: '...'}, 'text', element, ...): null is no child, false no attribute.
function maker(create) {
  return (name, ...parts) => {
    const [tag, ...classes] = name.split('.');
    const node = create(tag);
    if (classes.length) node.setAttribute('class', classes.join(' '));
    for (const part of parts) {
      if (typeof part === 'string' || part instanceof Node) node.append(part);
      else for (const [key, value] of Object.entries(part ?? {})) {
        if (key === 'click') node.addEventListener('click', value);
        else if (value !== false) node.setAttribute(key, value === true ? '' : value);
      }
    }
    return node;
  };
}
const el = maker(tag => document.createElement(tag));
const svg = maker(tag => document.createElementNS('http://www.w3.org/2000/svg', tag));
const path = (name, d) => svg(`path.${name}`, {d});

const unique = values => [...new Set(values)];
const number = value => value.toFixed(3);
const grouped = value => value.toLocaleString('en-US');
const words = text => text.toLowerCase().split(/\s+/).filter(Boolean);
const sure = point => point.low !== null && point.high !== null;
const interval = point => (sure(point) ? `[${number(point.low)}, ${number(point.high)}]` : '');

// --- State: it is in the address, so that what is shown can be sent to somebody ------------------

const DEFAULTS = {
  set: '', vs: '', show: 'all', q: '', page: '1', id: '', x: 'step', metric: '',
};
const state = {...DEFAULTS};

function readAddress() {
  if (!location.hash.includes('=')) return; // a part of the page
  const given = new URLSearchParams(location.hash.slice(1));
  // Links to examples say nothing of the curves.
  const kept = {...DEFAULTS, x: state.x, metric: state.metric};
  for (const name of Object.keys(DEFAULTS)) state[name] = given.get(name) ?? kept[name];
}

function addressOf(changes) {
  const all = Object.entries({...state, ...changes});
  const set = all.filter(([name, value]) => value !== DEFAULTS[name]);
  return '#' + new URLSearchParams(set).toString().replaceAll('%2F', '/');
}

function change(changes) {
  Object.assign(state, changes);
  history.replaceState(null, '', addressOf({}));
}

// --- Tables --------------------------------------------------------------------------------------

function sortable(table) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, i) => header.querySelector('button').addEventListener('click', () => {
    const sign = header.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    for (const other of headers) other.removeAttribute('aria-sort');
    header.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
    const numeric = [...body.rows].some(row => 'v' in row.cells[i].dataset);
    const key = row => row.cells[i].dataset.v ?? row.cells[i].textContent;
    // What has no number comes last either way.
    const compare = numeric
      ? (a, b) => (a === '') - (b === '') || sign * (a - b)
      : (a, b) => sign * a.localeCompare(b, 'en', {numeric: true});
    const keyed = [...body.rows].map(row => [key(row), row]);
    body.append(...keyed.sort(([a], [b]) => compare(a, b)).map(([, row]) => row));
  }));
}

function setUpTables() {
  document.querySelectorAll('table.sortable').forEach(sortable);
  for (const node of document.querySelectorAll('[data-mark]'))
    node.append(path('marker', mark(Number(node.dataset.mark))));
  const all = [...$('values-table').tBodies[0].rows];
  const textOf = row => [...row.cells].map(cell => cell.textContent).join(' ').toLowerCase();
  const texts = new Map(all.map(row => [row, textOf(row)]));
  const filter = () => {
    const wanted = words($('filter').value);
    for (const row of all) row.hidden = !wanted.every(word => texts.get(row).includes(word));
    const left = all.filter(row => !row.hidden).length;
    const of = left === all.length ? '' : ` of ${grouped(all.length)}`;
    $('filtered').textContent = `${grouped(left)}${of} values`;
  };
  $('filter').addEventListener('input', filter);
  filter();
}

function showAddress() {
  readAddress();
  drawCurves();
  showSet();
  if (location.hash.includes('set='))
    (document.querySelector('.card.linked') ?? $('examples')).scrollIntoView();
}

// Deferred until the two other parts of this script are there.
document.addEventListener('DOMContentLoaded', () => {
  setUpTables();
  setUpCurves();
  setUpExamples();
  addEventListener('hashchange', showAddress);
  showAddress();
});

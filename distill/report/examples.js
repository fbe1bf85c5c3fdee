// --- Examples ------------------------------------------------------------------------------------
//
// A set is what one checkpoint answered on one task and split. `current` is shown, with `beside`
// where two are compared.

const PAGE = 20;
const byName = new Map(DATA.sets.map(set => [set.name, set]));
let current = null, beside = null, rows = [];

// The texts that all students share, and the answers of one.
function examplesOf(set) {
  set.examples ??= set.rows.map(row => {
    const [index, prediction, correct, rationale, probability, generated] = row;
    const [id, input, gold, teacher, teacherRationale, humanRationale, teacherCorrect] =
      DATA.texts[index];
    return {id, input, gold, teacher, teacherRationale, humanRationale, teacherCorrect,
      prediction, correct, rationale, probability, generated};
  });
  return set.examples;
}

// Two right answers agree, though they may be written differently.
const differ = (a, rightA, b, rightB) => !(rightA && rightB) && a.trim() !== b.trim();

const studentAndTeacher = row => row.teacher !== null &&
  differ(row.prediction, row.correct, row.teacher, row.teacherCorrect);
const theTwo = row => row.other &&
  differ(row.prediction, row.correct, row.other.prediction, row.other.correct);
const right = (row, a, b) => row.other && row.correct === a && row.other.correct === b;
const FILTERS = {
  all: {label: () => 'all', test: () => true},
  errors: {label: () => 'errors', test: row => row.correct === false},
  teacher: {label: () => 'teacher wrong', test: row => row.teacherCorrect === false},
  disagree: {label: () => 'student and teacher differ', test: studentAndTeacher},
  differ: {label: () => 'answers differ', test: theTwo, ofTwo: true},
  only: {label: () => `only ${names()[0]} right`, test: r => right(r, true, false), ofTwo: true},
  other: {label: () => `only ${names()[1]} right`, test: r => right(r, false, true), ofTwo: true},
};

// Of the two that are compared.
const names = () => current.student === beside.student
  ? [current, beside].map(set => `step ${grouped(set.step)}`)
  : [current.student, beside.student];
const comparable = set => DATA.sets.filter(other =>
  other !== set && other.dataset === set.dataset && other.split === set.split);
const stepLabel = set => grouped(set.step) + (set.tags.length ? ` (${set.tags.join(', ')})` : '');

// The set that has a value of a field, and else is most like the current one.
function pick(field, value) {
  const chosen = set => set.tags.includes('chosen') === current.tags.includes('chosen');
  const wanted = {...current, [field]: value};
  const like = set => name => String(set[name]) === String(wanted[name]);
  const score = set => [...[field, 'student', 'task', 'split'].map(like(set)), chosen(set),
    like(set)('step')].map(Number).join('');
  return DATA.sets.reduce((best, set) => (score(set) > score(best) ? set : best));
}

function setUpExamples() {
  for (const field of ['student', 'task', 'split', 'step']) {
    $(field).addEventListener('change', () => {
      const next = pick(field, $(field).value);
      const kept = comparable(next).some(set => set.name === state.vs);
      change({set: next.name, vs: kept ? state.vs : '', page: '1', id: ''});
      showSet();
    });
  }
  $('vs').addEventListener('change', () => {
    const show = !$('vs').value && FILTERS[state.show]?.ofTwo ? 'all' : state.show;
    change({vs: $('vs').value, show, page: '1', id: ''});
    showSet();
  });
  $('q').addEventListener('input', () => {
    change({q: $('q').value, page: '1', id: ''});
    showRows();
  });
}

function options(select, values, chosen, label = value => value) {
  select.replaceChildren(...values.map(value =>
    el('option', {value, selected: value === chosen}, label(value))));
  select.disabled = values.length < 2;
}

function showSet() {
  current = byName.get(state.set) ?? DATA.sets[0];
  if (!current) {
    const none = 'No predictions were found beside these results.';
    $('examples').replaceChildren($('examples').querySelector('h2'), el('p.note', none));
    return;
  }
  const others = comparable(current);
  beside = others.find(set => set.name === state.vs) ?? null;

  let left = DATA.sets;
  for (const field of ['student', 'task', 'split']) {
    options($(field), unique(left.map(set => set[field])), current[field]);
    left = left.filter(set => set[field] === current[field]);
  }
  left = [...left].sort((a, b) => a.step - b.step);
  const labels = new Map(left.map(set => [String(set.step), stepLabel(set)]));
  options($('step'), [...labels.keys()], String(current.step), step => labels.get(step));
  options($('vs'), ['', ...others.map(set => set.name)], beside?.name ?? '', name => {
    if (!name) return 'no other';
    const set = byName.get(name);
    const task = set.task === current.task ? '' : `, ${set.task}`;
    return `${set.student}, step ${stepLabel(set)}${task}`;
  });

  const notes = [current, beside].filter(set => set && set.rows.length < set.total).map(set =>
    `Of ${set.student}, this page holds the first ${grouped(set.rows.length)} of ` +
    `${grouped(set.total)} examples (--max_examples).`);
  if (state.set && !byName.has(state.set))
    notes.unshift(`This report has no examples of ${state.set}.`);
  $('cut').hidden = !notes.length;
  $('cut').textContent = notes.join(' ');

  const otherRows = beside && new Map(examplesOf(beside).map(row => [row.id, row]));
  rows = examplesOf(current).map(row => ({...row, other: otherRows?.get(row.id) ?? null}));
  showRows();
}

function textOf(row) {
  row.text ??= [row.id, row.input, row.gold, row.teacher, row.prediction, row.rationale,
    row.teacherRationale, row.humanRationale, row.other?.prediction]
    .filter(Boolean).join('\n').toLowerCase();
  return row.text;
}

function showRows() {
  if (!current) return;
  const filters = Object.entries(FILTERS).filter(([, filter]) => beside || !filter.ofTwo);
  const show = filters.some(([name]) => name === state.show) ? state.show : 'all';
  if ($('q').value !== state.q) $('q').value = state.q;
  const wanted = words(state.q);
  const searched = rows.filter(row => wanted.every(word => textOf(row).includes(word)));
  $('show').replaceChildren(...filters.map(([name, filter]) => el('button', {
    type: 'button', 'data-show': name, 'aria-pressed': String(name === show),
    click: () => {
      change({show: name, page: '1', id: ''});
      showRows();
      $('show').querySelector(`[data-show=${name}]`).focus();
    },
  }, filter.label(), el('span', grouped(searched.filter(filter.test).length)))));

  const found = searched.filter(FILTERS[show].test);
  const last = Math.max(1, Math.ceil(found.length / PAGE));
  const linked = state.id ? found.findIndex(row => row.id === state.id) : -1;
  const asked = linked < 0 ? parseInt(state.page, 10) || 1 : Math.floor(linked / PAGE) + 1;
  const page = Math.min(last, Math.max(1, asked));
  const of = found.length === rows.length ? '' : ` of ${grouped(rows.length)}`;
  for (const node of document.querySelectorAll('.found'))
    node.textContent = `${grouped(found.length)}${of} examples`;
  for (const node of document.querySelectorAll('.pages')) {
    const turn = (to, label) => el('button', {
      type: 'button', disabled: to < 1 || to > last,
      click: () => {
        change({page: String(to), id: ''});
        showRows();
        $('examples').querySelector('.pager').scrollIntoView();
        // The button was made anew; at an end the other one is left.
        const left = [...node.querySelectorAll('button:enabled')];
        const same = left.find(button => button.textContent === label) ?? left[0];
        same.focus({preventScroll: true});
      },
    }, label);
    const where = `${grouped(page)} / ${grouped(last)}`;
    node.replaceChildren(...(last > 1
      ? [turn(page - 1, 'previous'), where, turn(page + 1, 'next')] : []));
  }
  $('cards').replaceChildren(...found.slice((page - 1) * PAGE, page * PAGE).map(card));
}

function correctness(correct) {
  if (correct === true) return el('span.mark.yes', '\u2713 right');
  if (correct === false) return el('span.mark.no', '\u2717 wrong');
  return el('span.mark.open', 'not scored');
}

const textOrNone = (value, none) =>
  value?.trim() ? el('span.text', {dir: 'auto'}, value) : el('span.empty', none);

function card(row) {
  const answer = (name, value, correct) =>
    [el('dt', name), el('dd', textOrNone(value, 'empty'), correctness(correct))];
  const reason = (name, value) => value
    ? [el('div.reason', el('small', `${name}\u2019s rationale`), textOrNone(value, 'empty'))] : [];
  const student = beside ? names()[0] : 'student';
  return el(row.id === state.id ? 'article.card.linked' : 'article.card',
    el('header',
      el('a', {href: addressOf({set: current.name, id: row.id, page: '1'})}, row.id),
      row.probability === null ? null : `probability ${number(row.probability)}`),
    el('div.body',
      el('div.text', {dir: 'auto'}, row.input ?? ''),
      el('div',
        el('dl.answers',
          el('dt', 'gold'), el('dd', textOrNone(row.gold, 'none')),
          ...answer(student, row.prediction, row.correct),
          ...(row.other ? answer(names()[1], row.other.prediction, row.other.correct) : []),
          ...(row.teacher === null ? [] : answer('teacher', row.teacher, row.teacherCorrect))),
        ...reason(student, row.rationale),
        ...(row.other ? reason(names()[1], row.other.rationale) : []),
        ...reason('teacher', row.teacherRationale),
        ...reason('human', row.humanRationale),
        row.generated === null ? null : el('details',
          el('summary', 'all that the student wrote'), textOrNone(row.generated, 'empty')))));
}

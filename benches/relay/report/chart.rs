//! The chart: one panel a figure, one bar a program, the goal as a dashed line. Plain SVG, readable on light
//! and dark pages.

use std::fmt::Write as _;

use super::Setting;
use crate::cell::{Figure, Row};
use crate::programs::Program;
use crate::results::{Connmark, Goal, Results, Verdict};

const PANEL_WIDTH: f64 = 480.0;
const NAME_WIDTH: f64 = 110.0;
/// Room behind the longest bar for its value.
const VALUE_WIDTH: f64 = 120.0;
const BAR: f64 = 14.0;
const LINE: f64 = 20.0;
const HEAD: f64 = 26.0;
const MARGIN: f64 = 16.0;
const COLUMNS: usize = 2;

/// One figure of every program.
pub(crate) struct Panel {
    /// What is shown, and in which unit.
    pub(crate) title: String,
    /// Whether more is better.
    pub(crate) is_rate: bool,
    /// Each program with its bar.
    pub(crate) bars: Vec<(Program, Bar)>,
    /// Where the dashed line stands.
    pub(crate) goal: Option<f64>,
}

/// What a program showed.
pub(crate) enum Bar {
    /// It has no such figure.
    Absent,
    /// Why there is none.
    Failed(String),
    /// As long as the value, beside its text.
    Value(f64, String),
}

/// The chart of the first table of the results.
pub(crate) fn to_svg(setting: &Setting, results: &Results) -> String {
    let connmark = setting.connmarks.first().copied().unwrap_or_default();
    let panels: Vec<Panel> = setting
        .lines()
        .filter(|&(_, figure)| !matches!(figure, Figure::ConnectP99 | Figure::IdleDescriptors))
        .map(|(row, figure)| panel(setting, results, (connmark, row, figure)))
        .collect();
    draw(&panels, &setting.machine())
}

fn panel(
    setting: &Setting,
    results: &Results,
    (connmark, row, figure): (Connmark, Row, Figure),
) -> Panel {
    let verdict = |program| results.verdict(connmark, row, program, figure);
    let bar = |program| match verdict(program) {
        Verdict::Absent => Bar::Absent,
        Verdict::Failed(count) => Bar::Failed(format!("failed ({count})")),
        Verdict::Median(value) => {
            let shown = match results.ratio(connmark, row, program, figure) {
                Some(ratio) => format!("{} ({ratio:.2} ×)", figure.show(value)),
                None => figure.show(value),
            };
            Bar::Value(value, shown)
        }
    };
    Panel {
        title: full_title(row, figure),
        is_rate: figure.is_rate(),
        bars: setting
            .programs
            .iter()
            .map(|&(program, _)| (program, bar(program)))
            .collect(),
        goal: match (figure.goal(), verdict(Program::Direct)) {
            (Goal::OfDirect(share), Verdict::Median(direct)) => Some(share * direct),
            (Goal::AtMost(limit), _) => Some(limit),
            _ => None,
        },
    }
}

/// Panels in two columns, and a line below them.
pub(crate) fn draw(panels: &[Panel], below: &str) -> String {
    let most = panels.iter().map(|panel| panel.bars.len()).max();
    let panel_height = HEAD + LINE * most.unwrap_or_default() as f64 + MARGIN;
    let rows = panels.len().div_ceil(COLUMNS);
    let width = MARGIN + COLUMNS as f64 * (PANEL_WIDTH + MARGIN);
    let height = 2.0 * MARGIN + rows as f64 * panel_height + LINE;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>text{{fill:#222;stroke:#fff;stroke-width:3px;paint-order:stroke}}.n{{fill:#555}}.b{{fill:#9aa7b5}}.d{{fill:#d4dae0}}.m{{fill:#c2410c}}\
         .g{{stroke:#222;stroke-dasharray:3 3}}.f{{fill:#b91c1c}}</style>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for (index, panel) in panels.iter().enumerate() {
        let x = MARGIN + (index % COLUMNS) as f64 * (PANEL_WIDTH + MARGIN);
        let y = MARGIN + (index / COLUMNS) as f64 * panel_height;
        let _ = writeln!(out, "<g transform=\"translate({x} {y})\">");
        draw_panel(&mut out, panel);
        out.push_str("</g>\n");
    }
    let _ = writeln!(
        out,
        "<text class=\"n\" x=\"{MARGIN}\" y=\"{}\">{}</text>\n</svg>",
        height - MARGIN,
        escape(below)
    );
    out
}

fn draw_panel(out: &mut String, panel: &Panel) {
    let longest = panel
        .bars
        .iter()
        .filter_map(|(_, bar)| match bar {
            Bar::Value(value, _) => Some(*value),
            _ => None,
        })
        .chain(panel.goal)
        .fold(f64::MIN_POSITIVE, f64::max);
    let scale = (PANEL_WIDTH - NAME_WIDTH - VALUE_WIDTH) / longest;
    let better = match panel.is_rate {
        true => "more is better",
        false => "less is better",
    };
    let _ = writeln!(
        out,
        "<text y=\"12\" font-weight=\"bold\">{} <tspan class=\"n\" font-weight=\"normal\">({better})</tspan></text>",
        escape(&panel.title)
    );
    // the goal is drawn over the bars and under the values
    let mut values = String::new();
    for (index, (program, bar)) in panel.bars.iter().enumerate() {
        let top = HEAD + index as f64 * LINE;
        let base = top + 11.0;
        let _ = writeln!(
            out,
            "<text class=\"n\" x=\"{}\" y=\"{base}\" text-anchor=\"end\">{}</text>",
            NAME_WIDTH - 6.0,
            program.title()
        );
        let (x, class, shown) = match bar {
            Bar::Absent => (NAME_WIDTH, " class=\"n\"", "–"),
            Bar::Failed(why) => (NAME_WIDTH, " class=\"f\"", why.as_str()),
            Bar::Value(value, shown) => {
                let class = match program {
                    Program::Direct => "d",
                    Program::Mmproxyctl => "m",
                    _ => "b",
                };
                let length = value * scale;
                let _ = writeln!(
                    out,
                    "<rect class=\"{class}\" x=\"{NAME_WIDTH}\" y=\"{top}\" width=\"{length:.1}\" height=\"{BAR}\"/>"
                );
                (NAME_WIDTH + length + 6.0, "", shown.as_str())
            }
        };
        let _ = writeln!(
            values,
            "<text{class} x=\"{x:.1}\" y=\"{base}\">{}</text>",
            escape(shown)
        );
    }
    if let Some(goal) = panel.goal {
        let x = NAME_WIDTH + goal * scale;
        let bottom = HEAD + panel.bars.len() as f64 * LINE;
        let _ = writeln!(
            out,
            "<line class=\"g\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{bottom}\"/>",
            HEAD - 4.0
        );
    }
    out.push_str(&values);
}

/// Lines that continue a row's first one say which.
fn full_title(row: Row, figure: Figure) -> String {
    let short = match row {
        Row::Bulk => "bulk echo",
        Row::Exchange => "request/response",
        Row::Connect => "connections",
        Row::Idle => "idle connection",
    };
    match figure.title().strip_prefix("… ") {
        Some(rest) => format!("{short}: {rest}"),
        None => figure.title().to_owned(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

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

/// The chart of the first table of the results.
pub(crate) fn to_svg(setting: &Setting, results: &Results) -> String {
    let connmark = setting.connmarks.first().copied().unwrap_or_default();
    let panels: Vec<_> = setting
        .lines()
        .filter(|&(_, figure)| !matches!(figure, Figure::ConnectP99 | Figure::IdleDescriptors))
        .collect();
    let panel_height = HEAD + LINE * setting.programs.len() as f64 + MARGIN;
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
    for (index, (row, figure)) in panels.into_iter().enumerate() {
        let x = MARGIN + (index % COLUMNS) as f64 * (PANEL_WIDTH + MARGIN);
        let y = MARGIN + (index / COLUMNS) as f64 * panel_height;
        let _ = writeln!(out, "<g transform=\"translate({x} {y})\">");
        panel(&mut out, setting, results, (connmark, row, figure));
        out.push_str("</g>\n");
    }
    let _ = writeln!(
        out,
        "<text class=\"n\" x=\"{MARGIN}\" y=\"{}\">{}</text>\n</svg>",
        height - MARGIN,
        escape(&setting.machine())
    );
    out
}

fn panel(
    out: &mut String,
    setting: &Setting,
    results: &Results,
    (connmark, row, figure): (Connmark, Row, Figure),
) {
    let verdict = |program| results.verdict(connmark, row, program, figure);
    let goal = match (figure.goal(), verdict(Program::Direct)) {
        (Goal::OfDirect(share), Verdict::Median(direct)) => Some(share * direct),
        (Goal::AtMost(limit), _) => Some(limit),
        _ => None,
    };
    let longest = setting
        .programs
        .iter()
        .filter_map(|&(program, _)| match verdict(program) {
            Verdict::Median(value) => Some(value),
            _ => None,
        })
        .chain(goal)
        .fold(f64::MIN_POSITIVE, f64::max);
    let scale = (PANEL_WIDTH - NAME_WIDTH - VALUE_WIDTH) / longest;
    let better = if figure.is_rate() {
        "more is better"
    } else {
        "less is better"
    };
    let _ = writeln!(
        out,
        "<text y=\"12\" font-weight=\"bold\">{} <tspan class=\"n\" font-weight=\"normal\">({better})</tspan></text>",
        escape(&full_title(row, figure))
    );
    // the goal is drawn over the bars and under the values
    let mut values = String::new();
    for (index, &(program, _)) in setting.programs.iter().enumerate() {
        let top = HEAD + index as f64 * LINE;
        let base = top + 11.0;
        let _ = writeln!(
            out,
            "<text class=\"n\" x=\"{}\" y=\"{base}\" text-anchor=\"end\">{}</text>",
            NAME_WIDTH - 6.0,
            program.title()
        );
        match verdict(program) {
            Verdict::Absent => {
                let _ = writeln!(
                    out,
                    "<text class=\"n\" x=\"{NAME_WIDTH}\" y=\"{base}\">–</text>"
                );
            }
            Verdict::Failed(count) => {
                let _ = writeln!(
                    out,
                    "<text class=\"f\" x=\"{NAME_WIDTH}\" y=\"{base}\">failed ({count})</text>"
                );
            }
            Verdict::Median(value) => {
                let class = match program {
                    Program::Direct => "d",
                    Program::Mmproxyctl => "m",
                    _ => "b",
                };
                let length = value * scale;
                let shown = match results.ratio(connmark, row, program, figure) {
                    Some(ratio) => format!("{} ({ratio:.2} ×)", figure.show(value)),
                    None => figure.show(value),
                };
                let _ = writeln!(
                    out,
                    "<rect class=\"{class}\" x=\"{NAME_WIDTH}\" y=\"{top}\" width=\"{length:.1}\" height=\"{BAR}\"/>"
                );
                let _ = writeln!(
                    values,
                    "<text x=\"{:.1}\" y=\"{base}\">{shown}</text>",
                    NAME_WIDTH + length + 6.0
                );
            }
        }
    }
    if let Some(goal) = goal {
        let x = NAME_WIDTH + goal * scale;
        let bottom = HEAD + setting.programs.len() as f64 * LINE;
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

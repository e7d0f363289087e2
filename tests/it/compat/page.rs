//! The shell blocks of docs/migrating.md, so that its commands are run as they stand there.

use crate::chain::deployment::shipped;

/// A section of the page: what it is called, and its blocks in their order.
#[derive(Debug)]
pub(super) struct Section {
    pub(super) title: String,
    pub(super) blocks: Vec<Block>,
    steps: usize,
}

/// A block of commands.
#[derive(Debug)]
pub(super) struct Block {
    /// The commands.
    pub(super) script: String,
    /// The step that it belongs to, from 1; 0 outside of the steps.
    pub(super) step: usize,
    /// Whether it needs a container engine with images from a registry.
    pub(super) docker: bool,
}

/// All sections of the page.
pub(super) fn sections() -> Vec<Section> {
    let text = std::fs::read_to_string(shipped("docs/migrating.md")).expect("the page");
    let mut sections: Vec<Section> = Vec::new();
    let mut open: Option<Block> = None;
    let mut step = 0;
    for line in text.lines() {
        let bare = line.trim_start();
        if let Some(block) = &mut open {
            if bare == "```" {
                let section = sections.last_mut().expect("a block in a section");
                section.blocks.extend(open.take());
            } else {
                block.script.push_str(bare);
                block.script.push('\n');
            }
            continue;
        }
        if let Some(title) = line.strip_prefix("## ") {
            sections.push(Section {
                title: title.to_owned(),
                blocks: Vec::new(),
                steps: 0,
            });
            step = 0;
        } else if let Some(section) = sections.last_mut() {
            let number = line
                .split_once(". ")
                .and_then(|(number, _)| number.parse().ok());
            if let Some(number) = number {
                step = number;
                section.steps = section.steps.max(step);
            } else if !line.is_empty() && !line.starts_with(' ') && !line.starts_with('`') {
                // a paragraph of its own ends the list
                step = 0;
            }
        }
        if let Some(language) = bare.strip_prefix("```") {
            assert!(
                matches!(language, "sh" | "sh docker"),
                "a block of {language}"
            );
            open = Some(Block {
                script: String::new(),
                step,
                docker: language.ends_with("docker"),
            });
        }
    }
    sections
}

/// The section whose title begins so.
pub(super) fn section(title: &str) -> Section {
    let found = sections()
        .into_iter()
        .find(|one| one.title.starts_with(title));
    found.unwrap_or_else(|| panic!("docs/migrating.md has no section {title}"))
}

impl Section {
    /// The commands of a step.
    pub(super) fn step(&self, step: usize) -> String {
        let of_step = |block: &&Block| block.step == step && !block.docker;
        let scripts = self
            .blocks
            .iter()
            .filter(of_step)
            .map(|block| block.script.as_str());
        scripts.collect()
    }
}

#[test]
fn five_steps_with_commands_each() {
    for section in sections() {
        assert_eq!(section.steps, 5, "{}", section.title);
        for step in 1..=5 {
            let mut of_step = section.blocks.iter().filter(|block| block.step == step);
            assert!(of_step.next().is_some(), "{}: {step}", section.title);
        }
    }
}

//! What is printed for the shell and the manual: complete, and no panic where it cannot be written.

use std::fs::File;
use std::process::Command;

fn mmproxyctl(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmproxyctl"));
    command.args(words);
    command
}

#[test]
fn every_page_that_the_manual_refers_to_is_there() {
    let output = mmproxyctl(&["man"]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap().replace('\\', "");
    for page in ["mmproxyctl", "mmproxyctl-run", "mmproxyctl-pathway-add"] {
        assert!(text.contains(&format!(".TH {page} 1")), "no {page}");
    }
    let referred = text.lines().filter_map(|line| line.strip_suffix("(1)"));
    let mut count = 0;
    for page in referred.filter(|page| !page.ends_with("help")) {
        assert!(text.contains(&format!(".TH {page} 1")), "no {page}");
        count += 1;
    }
    assert!(count > 10, "{count} pages");
    for option in ["drain-timeout", "dry-run", "corrupt"] {
        assert!(text.contains(option), "nothing about --{option}");
    }
}

#[test]
fn pages_as_files_for_a_package() {
    let dir = tempfile::tempdir().unwrap();
    let output = mmproxyctl(&["man", "--dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    for (page, names) in [
        ("mmproxyctl.1", "mmproxyctl-pathway"),
        ("mmproxyctl-run.1", "--json-config"),
        ("mmproxyctl-pathway-add.1", "--dry-run"),
        ("go-mmproxy.1", "-allowed-subnets"),
        ("mmproxy.1", "-force-real-client-port"),
    ] {
        let text = std::fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(
            text.starts_with(".ie") || text.starts_with(".TH"),
            "{page}: {text}"
        );
        assert_eq!(text.matches(".TH ").count(), 1, "{page}");
        assert!(text.replace('\\', "").contains(names), "{page}: {text}");
    }
    let unwritable = mmproxyctl(&["man", "--dir", "/proc/none"])
        .output()
        .unwrap();
    assert_eq!(unwritable.status.code(), Some(1), "{unwritable:?}");
}

#[test]
fn a_full_stdout_is_an_error_and_no_panic() {
    for words in [
        ["completions", "bash"].as_slice(),
        &["completions", "zsh"],
        &["man"],
    ] {
        let output = mmproxyctl(words)
            .stdout(File::options().write(true).open("/dev/full").unwrap())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("No space left"), "{said}");
    }
}

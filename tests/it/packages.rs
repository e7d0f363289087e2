//! The packages: what their metadata names is there, and the built ones install, run and go.

#[cfg(feature = "soak")]
mod install;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::chain::deployment::shipped;

/// `[package.metadata]` as cargo reads it.
fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(shipped("Cargo.toml"))
        .output()
        .expect("cargo metadata");
    assert!(output.status.success(), "{output:?}");
    let mut all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    all["packages"][0]["metadata"].take()
}

/// A file of a package: where it comes from, where it goes. A link has what it leads to instead.
struct Asset {
    source: Option<String>,
    dest: String,
    leads_to: Option<String>,
}

fn assets(metadata: &Value) -> Vec<Asset> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let list = metadata["assets"].as_array().expect("assets");
    let assets = list.iter().map(|one| match one {
        Value::Array(words) => Asset {
            source: text(&words[0]),
            dest: text(&words[1]).expect("a destination"),
            leads_to: None,
        },
        table => Asset {
            source: text(&table["source"]),
            dest: text(&table["dest"]).expect("a destination"),
            leads_to: text(&table["link_name"]),
        },
    });
    assets.collect()
}

/// What packaging/build.sh makes before it packs: the program and what packaging/share.sh makes with it.
fn made(dir: &Path) {
    let program = dir.join("bin/mmproxyctl");
    std::fs::create_dir(dir.join("bin")).expect("create directory");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mmproxyctl"), &program).expect("link");
    let output = Command::new(shipped("packaging/share.sh"))
        .arg(&program)
        .arg(dir)
        .output()
        .expect("share.sh");
    assert!(output.status.success(), "{output:?}");
}

/// The files that a source names; a star stands for anything but a slash.
fn sources(pattern: &str, made: &Path) -> Vec<PathBuf> {
    let pattern = match pattern.strip_prefix("target/release/package/") {
        Some(rest) => made.join(rest),
        None => shipped(pattern),
    };
    let pattern = pattern.to_str().expect("UTF-8");
    let output = Command::new("bash")
        .args([
            "-c",
            "shopt -s failglob; printf '%s\\n' $1",
            "bash",
            pattern,
        ])
        .output()
        .expect("bash");
    let lines = String::from_utf8(output.stdout).expect("UTF-8");
    let files = lines
        .lines()
        .map(PathBuf::from)
        .filter(|file| file.is_file());
    files.collect()
}

#[test]
fn what_the_metadata_names_is_there() {
    let made_dir = tempfile::tempdir().expect("a directory");
    made(made_dir.path());
    let metadata = metadata();
    for kind in ["deb", "generate-rpm"] {
        let all = assets(&metadata[kind]);
        let mut packed = BTreeSet::new();
        for asset in &all {
            let Some(pattern) = &asset.source else {
                continue;
            };
            let found = sources(pattern, made_dir.path());
            assert!(!found.is_empty(), "{kind}: {pattern} names no file");
            packed.extend(found);
        }
        // nothing that an installation has is forgotten
        for pattern in [
            "systemd/*",
            "config/*",
            "docs/*.md",
            "target/release/package/man/*",
            "target/release/package/completions/*",
        ] {
            for file in sources(pattern, made_dir.path()) {
                assert!(packed.contains(&file), "{kind} lacks {}", file.display());
            }
        }
        let dests: Vec<&str> = all
            .iter()
            .map(|asset| asset.dest.trim_start_matches('/'))
            .collect();
        for wanted in [
            "usr/bin/",
            "usr/lib/systemd/system/",
            "etc/mmproxy/",
            "usr/share/man/man1/",
        ] {
            assert!(
                dests.iter().any(|dest| dest.starts_with(wanted)),
                "{kind}: {wanted}"
            );
        }
    }
    let pages = sources("target/release/package/man/*.1.gz", made_dir.path());
    for page in [
        "mmproxyctl.1.gz",
        "mmproxyctl-run.1.gz",
        "go-mmproxy.1.gz",
        "mmproxy.1.gz",
    ] {
        let path = made_dir.path().join("man").join(page);
        assert!(pages.contains(&path), "no {page}");
    }
}

#[test]
fn the_old_names_are_installed() {
    let metadata = metadata();
    // Debian's tool packs links; cargo-generate-rpm does not, so there the scripts make and remove them
    for name in ["go-mmproxy", "mmproxy"] {
        let link = assets(&metadata["deb"])
            .into_iter()
            .find(|asset| asset.dest == format!("usr/bin/{name}"));
        let leads_to = link.unwrap_or_else(|| panic!("no {name}")).leads_to;
        assert_eq!(leads_to.as_deref(), Some("mmproxyctl"));
    }
    for relation in ["conflicts", "replaces", "provides"] {
        assert_eq!(metadata["deb"][relation], "go-mmproxy", "{relation}");
    }
    for script in [
        "post_install_script",
        "pre_uninstall_script",
        "post_uninstall_script",
    ] {
        let path = metadata["generate-rpm"][script].as_str().expect("a path");
        assert!(shipped(path).is_file(), "{path}");
    }
}

#[test]
fn scripts_are_what_the_package_managers_run() {
    for script in [
        "debian/postinst",
        "debian/prerm",
        "debian/postrm",
        "rpm/post.sh",
        "rpm/preun.sh",
        "rpm/postun.sh",
    ] {
        let path = shipped("packaging").join(script);
        let checked = Command::new("sh")
            .arg("-n")
            .arg(&path)
            .output()
            .expect("sh");
        assert!(checked.status.success(), "{checked:?}");
    }
}

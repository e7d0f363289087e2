//! The three files through the binary: `mmproxyctl check`, exit codes, where files are looked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A configuration directory of a test's own.
struct Files(tempfile::TempDir);

impl Files {
    fn new(pathways: &str, instances: &str, allow: &str) -> Self {
        let files = Self(tempfile::tempdir().expect("temporary directory"));
        files.write("pathways.conf", pathways);
        files.write("instances.tsv", instances);
        files.write("allow.txt", allow);
        files
    }

    /// The shipped example files under their working names.
    fn examples() -> Self {
        let example = |name: &str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("config")
                .join(format!("{name}.example"));
            fs::read_to_string(path).expect("example file")
        };
        Self::new(
            &example("pathways.conf"),
            &example("instances.tsv"),
            &example("allow.txt"),
        )
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, text).expect("write a file");
        path
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn check(&self, more: &[&str]) -> Seen {
        let mut command = mmproxyctl();
        command.arg("--config-dir").arg(self.path());
        Seen::of(command.arg("check").args(more))
    }
}

/// The binary without what the caller's environment says about configuration.
fn mmproxyctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmproxyctl"));
    command
        .env_remove("MMPROXY_CONFIG_DIR")
        .env_remove("ALLOW_LIST_PATH");
    command
}

struct Seen {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Seen {
    fn of(command: &mut Command) -> Self {
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().expect("run mmproxyctl");
        Self {
            code: status.code(),
            stdout: String::from_utf8(stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(stderr).expect("stderr is UTF-8"),
        }
    }

    #[track_caller]
    fn valid(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// What stderr has of a configuration that is refused.
    #[track_caller]
    fn refused(self) -> String {
        assert_eq!(self.code, Some(2), "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        self.stderr
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

const PATHWAYS: &str = "123\n124\n";
const INSTANCES: &str = "vps01-ssh\t123\t100.64.0.9:2222\t127.0.0.1\t22\t::1\n";
const ALLOW: &str = "100.64.0.1\n";

#[test]
fn the_shipped_examples_are_a_configuration() {
    let seen = Files::examples().check(&[]);
    assert_eq!(seen.stderr, "");
    let summary = seen.valid();
    for word in [
        "vps01",
        "router01",
        "vps01-ssh",
        "vps01-web",
        "router01-ssh",
        "loopback",
    ] {
        assert!(summary.contains(word), "{word} in {summary}");
    }
}

#[test]
fn the_summary_has_every_value() {
    let files = Files::new(
        "123 name=vps01 table=1123 priority=90 mask=0xfff connmark=auto targets=10.0.0.0/24\n",
        "a\t0x7b\t100.64.0.9:2222\t10.1.0.5\t22\t-\tport=any,idle-timeout=90s,allow=own.txt\n",
        ALLOW,
    );
    files.write("own.txt", "192.0.2.0/24\n");
    let summary = files
        .check(&[])
        .valid()
        .replace(files.path().to_str().unwrap(), "DIR");
    snapbox::assert_data_eq!(
        summary,
        snapbox::str![[r#"
DIR is valid: 1 pathway, 1 instance

PATHWAY  NAME   TABLE  PRIORITY  MASK   CONNMARK  TARGETS
123      vps01  1123   90        0xfff  auto      loopback, 10.0.0.0/24, 10.1.0.5/32

INSTANCE  PATHWAY  LISTEN               IPV4 TARGET  IPV6 TARGET  OPTIONS
a         123      tcp 100.64.0.9:2222  10.1.0.5:22  -            idle-timeout=90s,allow=own.txt,port=any

allow list DIR/allow.txt: 100.64.0.1

"#]]
    );
}

/// The form of the files that the shell set-up came with: six columns, comments, a commented line at
/// the end without a newline.
#[test]
fn files_of_the_shell_setup_work_unchanged() {
    let pathways =
        "# Marks, one a line.\n#\n# Lines that begin with '#' are ignored.\n\n123\n124\n#125 ";
    let instances = "# Format:\n# <name>\t<fwmark>\t<listen_addr>\t<target_ipv4>\t<port>\t<target_ipv6>\n#\n\n\
        vps01-ssh\t123\t100.101.102.123:2222\t127.0.0.1\t22\t::1\n\
        vps01-web\t123\t100.101.102.123:8443\t127.0.0.1\t443\t::1\n\
        router01-ssh\t124\t100.101.102.123:2223\t127.0.0.1\t22\t::1";
    let allow = "# Trusted proxies\n\n# vps01\n100.103.104.105\n\n# router01\n# 100.x.x.x ";
    let plain = Files::new(pathways, instances, allow)
        .check(&["--json"])
        .json();
    assert_eq!(plain["valid"], true, "{plain}");
    assert_eq!(plain["pathways"].as_array().unwrap().len(), 2);
    let first = &plain["instances"][0];
    assert_eq!(first["listen"], "100.101.102.123:2222");
    assert_eq!(first["target4"], "127.0.0.1:22");
    assert_eq!(first["target6"], "[::1]:22");
    assert_eq!(plain["instances"][2]["mark"], 124);
    assert_eq!(
        plain["allow_list"]["allowed"],
        serde_json::json!(["100.103.104.105"])
    );

    type Edit = fn(&str) -> String;
    let edits: [(&str, Edit); 5] = [
        ("CRLF", |text| text.replace('\n', "\r\n")),
        ("trailing spaces", |text| text.replace('\n', "  \n") + " "),
        ("blank lines", |text| text.replace('\n', "\n \t\n\n")),
        ("a final newline", |text| text.to_owned() + "\n"),
        ("a byte-order mark", |text| "\u{feff}".to_owned() + text),
    ];
    for (what, edit) in edits {
        let edited = Files::new(&edit(pathways), &edit(instances), &edit(allow));
        let seen = edited.check(&["--json"]);
        assert_eq!(seen.code, Some(0), "{what}: {}", seen.stdout);
        for part in ["pathways", "instances"] {
            assert_eq!(seen.json()[part], plain[part], "{what}");
        }
    }
}

#[test]
fn all_mistakes_of_all_files_are_shown_at_once() {
    let files = Files::new(
        "123\n124 tabel=5\n123\n",
        "a\t125\t100.64.0.9:2222\t::1\t22\t::1\n\
         b 123 100.64.0.9:2222 127.0.0.1 22 ::1\n\
         c\t123\t100.64.0.9:1\t127.0.0.1\t22\t::1\tallow=missing.txt,protocol=tpc\n",
        "100.64.0.1\n100.x.x.x\n",
    );
    let seen = files.check(&[]).refused();
    for place in [
        "pathways.conf:2:5",
        "pathways.conf:3:1",
        "instances.tsv:1:3",
        "instances.tsv:1:23",
        "instances.tsv:2:2",
        "instances.tsv:2:7",
        "instances.tsv:3:37",
        "instances.tsv:3:64",
        "allow.txt:2:1",
    ] {
        let place = format!("--> {}/{place}\n", files.path().display());
        assert!(seen.contains(&place), "{place} in {seen}");
    }
    assert!(
        seen.ends_with(
            "error: 9 mistakes in the configuration: nothing was started, nothing was changed\n"
        ),
        "{seen}"
    );
    assert!(
        !seen.contains('\u{1b}'),
        "colour without a terminal: {seen}"
    );
}

#[test]
fn mistakes_are_json_too() {
    let seen =
        Files::new("123\n", "a\t125\t100.64.0.9:2222\t127.0.0.1\t22\t::1\n", "").check(&["--json"]);
    assert_eq!((seen.code, seen.stderr.as_str()), (Some(2), ""));
    let json = seen.json();
    assert_eq!(json["valid"], false);
    assert_eq!(json["errors"], 2);
    let mark = &json["diagnostics"][0];
    assert_eq!(mark["severity"], "error");
    assert!(mark["file"].as_str().unwrap().ends_with("/instances.tsv"));
    assert_eq!(
        (&mark["line"], &mark["column"], &mark["length"]),
        (&1.into(), &3.into(), &3.into())
    );
    assert_eq!(mark["problem"], "no pathway has mark 125");
    assert_eq!(mark["expected"], "123, the mark that pathways.conf has");
    let list = &json["diagnostics"][1];
    assert!(list["file"].as_str().unwrap().ends_with("/allow.txt"));
    assert_eq!(list["line"], Value::Null);
}

#[test]
fn a_bad_allow_list_never_means_everyone() {
    let files = Files::new(PATHWAYS, INSTANCES, ALLOW);
    for bad in [
        "",
        "\n",
        "# nobody\n",
        "100.64.0.1\nproxy\n",
        "100.64.0.1/33\n",
    ] {
        files.write("allow.txt", bad);
        let seen = files.check(&[]).refused();
        assert!(seen.contains("/allow.txt"), "{bad:?}: {seen}");
        let own = Files::new(
            PATHWAYS,
            &INSTANCES.replace('\n', "\tallow=own.txt\n"),
            ALLOW,
        );
        own.write("own.txt", bad);
        let seen = own.check(&[]).refused();
        assert!(seen.contains("/own.txt"), "{bad:?}: {seen}");
    }
    fs::remove_file(files.path().join("allow.txt")).unwrap();
    let seen = files.check(&[]).refused();
    assert!(seen.contains("no list never means everyone"), "{seen}");
    fs::create_dir(files.path().join("allow.txt")).unwrap();
    assert!(files.check(&[]).refused().contains("Is a directory"));
    fs::remove_dir(files.path().join("allow.txt")).unwrap();

    files.write("allow.txt", "0.0.0.0/0\n::/0\n");
    let seen = files.check(&[]);
    assert_eq!(
        seen.stderr.matches("warning: ").count(),
        2,
        "{}",
        seen.stderr
    );
    assert!(seen.valid().contains("0.0.0.0/0, ::/0"));
}

#[test]
fn the_allow_list_of_the_environment() {
    let files = Files::new(PATHWAYS, INSTANCES, "not read\n");
    let elsewhere = files.write("proxies", ALLOW);
    let check = |value: &Path| {
        let mut command = mmproxyctl();
        command.env("ALLOW_LIST_PATH", value);
        Seen::of(command.arg("--config-dir").arg(files.path()).arg("check"))
    };
    let summary = check(&elsewhere).valid();
    assert!(summary.contains("/proxies: 100.64.0.1\n"), "{summary}");
    let seen = check(&files.path().join("none")).refused();
    assert!(
        seen.contains("/none: No such file") && seen.contains("$ALLOW_LIST_PATH"),
        "{seen}"
    );
    // set but empty is not set
    assert!(check(Path::new("")).refused().contains("allow.txt:1:1"));
}

#[test]
fn where_the_directory_is_looked_for() {
    let files = Files::new(PATHWAYS, INSTANCES, ALLOW);
    let from_environment = Seen::of(
        mmproxyctl()
            .env("MMPROXY_CONFIG_DIR", files.path())
            .arg("check"),
    );
    assert!(
        from_environment
            .valid()
            .starts_with(files.path().to_str().unwrap())
    );

    // the option comes before the environment, and one line says that the directory is missing
    let missing = files.path().join("missing");
    let mut command = mmproxyctl();
    command.env("MMPROXY_CONFIG_DIR", files.path());
    let seen = Seen::of(command.args(["check", "--config-dir"]).arg(&missing)).refused();
    assert!(
        seen.contains(&format!("cannot read {}: No such file", missing.display())),
        "{seen}"
    );
    assert!(
        seen.contains("--config-dir, else by $MMPROXY_CONFIG_DIR, else /etc/mmproxy"),
        "{seen}"
    );
    assert!(seen.contains("1 mistake in"), "{seen}");

    for file in ["pathways.conf", "instances.tsv"] {
        let files = Files::new(PATHWAYS, INSTANCES, ALLOW);
        fs::remove_file(files.path().join(file)).unwrap();
        let seen = files.check(&[]).refused();
        assert!(seen.contains(&format!("/{file}: No such file")), "{seen}");
        assert!(seen.contains("1 mistake in"), "{seen}");
    }
}

#[test]
fn files_that_are_no_text() {
    for (name, bytes, said) in [
        ("pathways.conf", &b"\xff\xfe1\0\n\0"[..], "UTF-16 text"),
        ("pathways.conf", b"12\xff3\n", "byte 0xff is not UTF-8"),
        ("instances.tsv", b"a\t1\0", "U+0000 (NUL)"),
        ("allow.txt", b"\x7fELF\x02\x01\x01\0", "U+007F"),
    ] {
        let files = Files::new(PATHWAYS, INSTANCES, ALLOW);
        files.write(name, bytes);
        let seen = files.check(&[]).refused();
        assert!(seen.contains(said) && seen.contains(name), "{seen}");
    }
}

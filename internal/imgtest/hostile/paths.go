package hostile

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// badNames are names of files that an image has no business with.
func badNames() map[string]string {
	return map[string]string{
		"outside by ..":          "../outside/" + Secret,
		"outside by link":        "link.raw",
		"outside by linked dir":  "linkdir/" + Secret,
		"password hashes":        "/etc/shadow",
		"own environment":        "/proc/self/environ",
		"own memory":             "/proc/self/mem",
		"own descriptors":        "/proc/self/fd/0",
		"endless device":         "/dev/zero",
		"terminal":               "/dev/tty",
		"fifo":                   "fifo",
		"socket":                 "/dev/log",
		"directory":              ".",
		"parent directory":       "..",
		"root":                   "/",
		"loop of links":          "loop",
		"json":                   `json:{"driver":"file","filename":"/etc/shadow"}`,
		"json of the network":    `json:{"driver":"nbd","host":"127.0.0.1"}`,
		"nbd":                    "nbd://127.0.0.1:1/x",
		"nbd over a socket":      "nbd:unix:/dev/log",
		"http":                   "http://127.0.0.1:1/x",
		"ssh":                    "ssh://localhost/etc/shadow",
		"file protocol":          "file:" + Secret,
		"fat":                    "fat:rw:/etc",
		"with a NUL":             "a\x00b",
		"with control sequences": "\x1b]0;owned\x07\x1b[2J\n\rmount-image: all is well",
		"not UTF-8":              "\xff\xfe\x80",
		"very long":              strings.Repeat("a/", 500),
		"deep":                   strings.Repeat("../", 300) + "etc/shadow",
		"no such file outside":   "/nonexistent/" + Secret,
	}
}

// traps makes the things that badNames refers to.
func traps(d Dirs) error {
	for link, target := range map[string]string{
		"link.raw": filepath.Join(d.Outside, Secret), "linkdir": d.Outside, "loop": "loop",
	} {
		if err := os.Symlink(target, filepath.Join(d.In, link)); err != nil {
			return err
		}
	}
	return mkfifo(filepath.Join(d.In, "fifo"))
}

func qcow2Paths() []Case {
	var all []Case
	for title, target := range badNames() {
		c := q2("backing file: "+title, Path, newQcow2().backing(target, "raw"), 1)
		c.Build = both(c.Build, traps)
		c2 := q2("data file: "+title, Path, newQcow2().dataFile(target), 1)
		c2.Build = both(c2.Build, traps)
		all = append(all, c, c2)
	}
	all = append(all,
		q2("backing file of a foreign format", Path, newQcow2().backing("x.raw", "vmdk"), 1, "vmdk"),
		q2("backing file without a format", Path, newQcow2().backing("x.raw", ""), 1, "--backing-format"))
	probe := q2("raw parent that begins like qcow2", Path, newQcow2().backing("guest.raw", "raw"), 1, "--backing-format")
	probe.Words = []string{"--backing-format", "guest.raw"}
	probe.Build = both(probe.Build, file("guest.raw", newQcow2().backing("/etc/shadow", "raw")))
	top := Case{Name: "raw image that begins like qcow2", Class: Path, Image: "guest.raw",
		Build: file("guest.raw", newQcow2().backing("/etc/shadow", "raw")), Exit: 1, Words: []string{"--format"}}
	return append(all, probe, top)
}

func chains() []Case {
	image := func(n, parent string) func(Dirs) error { return file(n, newQcow2().backing(parent, "qcow2")) }
	self := Case{Name: "its own parent", Class: Chain, Image: name, Build: image(name, name), Exit: 4, Words: []string{"loop"}}
	two := Case{Name: "parents in a ring", Class: Chain, Image: "a.qcow2", Build: both(image("a.qcow2", "b.qcow2"), image("b.qcow2", "a.qcow2")), Exit: 4, Words: []string{"loop"}}
	alias := Case{Name: "its own parent by another name", Class: Chain, Image: name, Exit: 4, Words: []string{"loop"},
		Build: both(image(name, "alias"), func(d Dirs) error {
			return os.Link(filepath.Join(d.In, name), filepath.Join(d.In, "alias"))
		})}
	data := Case{Name: "its own data file", Class: Chain, Image: name, Build: file(name, newQcow2().dataFile(name)), Exit: 4, Words: []string{"loop"}}
	deep := Case{Name: "1200 parents", Class: Chain, Image: "0", Exit: 1, Words: []string{"1000"}, Build: func(d Dirs) error {
		for i := range 1200 {
			// Small clusters keep the pile small.
			q := newQcow2().backing(fmt.Sprint(i+1), "qcow2")
			small := append(qcow2{}, q[:512]...)
			small.set32(20, 9).set64(24, 512).set32(36, 1).set64(40, 3*512).set64(48, 512)
			small = append(small, make([]byte, 4*512)...)
			small.set64(512, 2*512)
			for j := range 4 {
				be.PutUint16(small[2*512+2*j:], 1)
			}
			if err := os.WriteFile(filepath.Join(d.In, fmt.Sprint(i)), small, 0o644); err != nil {
				return err
			}
		}
		return nil
	}}
	return []Case{self, two, alias, data, deep}
}

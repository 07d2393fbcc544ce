package fsck

import (
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Severity says how bad a finding is.
type Severity uint8

const (
	// Note: worth knowing; nothing is wrong. Does not count for exit codes.
	Note Severity = iota + 1
	// Leak: space is used by nothing, or a count is too high. No data is in
	// danger.
	Leak
	// Damage: the image says something wrong. Data is lost or in danger.
	Damage
	// Fatal: the image, or a large part of it, cannot be used or checked.
	Fatal
)

func (s Severity) String() string {
	switch s {
	case Note:
		return "note"
	case Leak:
		return "leak"
	case Damage:
		return "damage"
	case Fatal:
		return "fatal"
	}
	return fmt.Sprintf("severity(%d)", uint8(s))
}

// MarshalText makes JSON say the name.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Code is a kind of finding. Codes are made by Register at init and compared
// by pointer.
type Code struct {
	// Name is stable: format.structure.problem, lower case, such as
	// "qcow2.l2.entry-past-eof".
	Name string
	// Severity is that of its findings, unless one says otherwise.
	Severity Severity
	// Meaning and Remedy are one or two sentences of plain text each: what is
	// wrong and what follows from it; what -p or -y does about it and what
	// that loses, or what the user can do.
	Meaning, Remedy string
}

func (c *Code) String() string { return c.Name }

var (
	codesMu sync.Mutex
	codes   = map[string]*Code{}
)

// wellFormed reports whether name is two to four parts with dots between them,
// each of words of small letters and digits with hyphens between them, the
// first of one word that begins with a letter. There are some 150 codes, which
// are looked at whenever the program starts.
func wellFormed(name string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyz"
	parts := strings.Split(name, ".")
	if len(parts) < 2 || len(parts) > 4 || strings.Contains(parts[0], "-") || !strings.ContainsAny(name[:1], letters) {
		return false
	}
	for _, p := range parts {
		for w := range strings.SplitSeq(p, "-") {
			if w == "" || strings.Trim(w, letters+"0123456789") != "" {
				return false
			}
		}
	}
	return true
}

// Register makes a code. It is meant for package variables and panics on a
// name that is malformed or taken and on missing texts.
func Register(name string, s Severity, meaning, remedy string) *Code {
	codesMu.Lock()
	defer codesMu.Unlock()
	switch {
	case !wellFormed(name):
		panic("fsck: malformed code " + name)
	case codes[name] != nil:
		panic("fsck: code registered twice: " + name)
	case s < Note || s > Fatal || meaning == "" || remedy == "":
		panic("fsck: code without severity, meaning or remedy: " + name)
	}
	c := &Code{Name: name, Severity: s, Meaning: meaning, Remedy: remedy}
	codes[name] = c
	return c
}

// Codes are all registered codes, by name.
func Codes() []*Code {
	codesMu.Lock()
	defer codesMu.Unlock()
	var all []*Code
	for _, c := range codes {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *Code) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// CodesMarkdown is the table of all registered codes, the body of
// docs/fsck-codes.md.
func CodesMarkdown() string {
	var b strings.Builder
	section := ""
	for _, c := range Codes() {
		if s, _, _ := strings.Cut(c.Name, "."); s != section {
			section = s
			fmt.Fprintf(&b, "\n## %s\n\n| code | severity | meaning | remedy |\n|---|---|---|---|\n", s)
		}
		cell := func(s string) string { return strings.ReplaceAll(s, "|", `\|`) }
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", c.Name, c.Severity, cell(c.Meaning), cell(c.Remedy))
	}
	return b.String()
}

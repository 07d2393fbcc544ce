package fsck

import (
	"fmt"
	"strings"

	"github.com/imagestack/imagestack/blockmap"
)

// Level says which mode of repair does a fix.
type Level uint8

const (
	// Preen fixes lose nothing, whatever else is wrong: -p and -y do them.
	Preen Level = iota + 1
	// Full fixes lose something or decide something in doubt: only -y (or the
	// user, when asked) does them.
	Full
)

func (l Level) String() string {
	switch l {
	case Preen:
		return "preen"
	case Full:
		return "full"
	}
	return fmt.Sprintf("level(%d)", uint8(l))
}

// MarshalText makes JSON say the name.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Place is where in which file something was found.
type Place struct {
	// File is a path. A checker leaves it "" for the file that it was given.
	File string
	// Offset is in bytes, -1 when no place fits.
	Offset int64
	// Field is the format's own name of the field, "" when none fits.
	Field string
	// Value is what was found there: an integer, which is shown in
	// hexadecimal, or anything else, which is shown quoted; nil is nothing.
	Value any
}

// ValueText is Value as it is shown, "" for nil.
func (p Place) ValueText() string {
	switch v := p.Value.(type) {
	case nil:
		return ""
	case uint8, uint16, uint32, uint64, int8, int16, int32, int64, int, uint:
		return fmt.Sprintf("%#x", v)
	default:
		return fmt.Sprintf("%q", fmt.Sprint(v))
	}
}

func (p Place) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Offset >= 0 {
		fmt.Fprintf(&b, ": offset %#x", p.Offset)
	}
	if p.Field != "" {
		fmt.Fprintf(&b, ": %s", p.Field)
		if v := p.ValueText(); v != "" {
			fmt.Fprintf(&b, " = %s", v)
		}
	}
	return b.String()
}

// Fix is what repair does about a finding.
type Fix struct {
	// Text says it in a few words, as an imperative: "set the count to 1".
	Text string
	// Level of a fix that Loses something is Full.
	Level Level
	// Loses are the guest ranges whose content is not what it was, or may not
	// be, after the fix. Empty means that nothing is lost.
	Loses []blockmap.Range
}

// Finding is one thing that is wrong, or worth knowing.
type Finding struct {
	Code *Code
	// Severity is 0 for that of the code.
	Severity Severity
	Place    Place
	// Guest are the ranges of the virtual disk that it concerns, if any. A
	// checker joins neighbours and gives at most a handful.
	Guest []blockmap.Range
	// Text says what is wrong, for people, in one line without the place.
	Text string
	// Fix is nil when nothing can be done, or is needed.
	Fix *Fix
}

// Sev is the severity of f.
func (f *Finding) Sev() Severity {
	if f.Severity != 0 {
		return f.Severity
	}
	return f.Code.Severity
}

// lossless reports whether -p may do the fix.
func (f *Finding) lossless() bool {
	return f.Fix != nil && f.Fix.Level == Preen && len(f.Fix.Loses) == 0
}

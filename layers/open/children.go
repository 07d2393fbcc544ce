package open

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// Children are the qcow2 images that name the image at path as their backing
// file, as far as they lie in its directory (of a symbolic link: in that of the
// link and in that of the file) or in one of dirs, not below, and not behind
// links that lead out of these. Images in other directories cannot be found;
// what cannot be read is passed over, but for dirs themselves.
func Children(ctx context.Context, path string, dirs ...string) ([]string, error) {
	k, err := LookForChildren(ctx, path, dirs...)
	return k.Children, err
}

// Kin are the qcow2 images around another image.
type Kin struct {
	// Children name it as their backing file.
	Children []string
	// Unclear are those with a header too damaged to tell what they stand on.
	Unclear []string
}

// LookForChildren is Children that also tells of which images it is not known.
func LookForChildren(ctx context.Context, path string, dirs ...string) (Kin, error) {
	var all Kin
	st, err := os.Stat(path)
	if err != nil {
		return all, err
	}
	own, err := Homes(path)
	if err != nil {
		return all, err
	}
	if !st.Mode().IsRegular() {
		own = nil // a device has no siblings
	}
	places := append(own, dirs...)
	var permitted []string
	for _, dir := range places {
		if real, err := realPath(dir); err == nil {
			permitted = append(permitted, real)
		}
	}
	var seen []string
	for i, dir := range places {
		real, err := realPath(dir)
		if err != nil {
			return all, err
		}
		if slices.Contains(seen, real) {
			continue
		}
		seen = append(seen, real)
		found, err := kinIn(ctx, dir, st, permitted)
		if err != nil && (i >= len(own) || ctx.Err() != nil) {
			return Kin{}, err
		}
		all.Children, all.Unclear = append(all.Children, found.Children...), append(all.Unclear, found.Unclear...)
	}
	return all, nil
}

// Homes are the directories in which the file at path lies: that of the name,
// and of a symbolic link also that of the file.
func Homes(path string) ([]string, error) {
	real, err := realPath(path)
	if err != nil {
		return nil, err
	}
	dir, err := realPath(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	homes := []string{filepath.Dir(path)}
	if other := filepath.Dir(real); other != dir {
		homes = append(homes, other)
	}
	return homes, nil
}

// leadsInto reports whether a link leads to a file in one of the directories.
// Files elsewhere are nobody's business, whoever has put a link to them here.
func leadsInto(link string, dirs []string) bool {
	real, err := realPath(link)
	return err == nil && slices.Contains(dirs, filepath.Dir(real))
}

// kinIn are those in one directory; permitted are all that are looked at.
func kinIn(ctx context.Context, dir string, base os.FileInfo, permitted []string) (Kin, error) {
	var k Kin
	d, err := os.Open(dir)
	if err != nil {
		return k, err
	}
	defer d.Close()
	for {
		list, err := d.ReadDir(1024)
		if errors.Is(err, io.EOF) {
			return k, nil
		}
		if err != nil {
			return k, err
		}
		for _, e := range list {
			if err := ctx.Err(); err != nil {
				return k, err
			}
			child := filepath.Join(dir, e.Name())
			if e.Type()&os.ModeSymlink != 0 && !leadsInto(child, permitted) {
				continue
			}
			st, err := os.Stat(child) // what a link leads to, too
			if err != nil || !st.Mode().IsRegular() || os.SameFile(st, base) {
				continue
			}
			switch name, known := backingName(child); {
			case !known:
				k.Unclear = append(k.Unclear, child)
			case standsOn(dir, name, base):
				k.Children = append(k.Children, child)
			}
		}
	}
}

// standsOn reports whether a backing file name in an image in dir leads to
// base.
func standsOn(dir, name string, base os.FileInfo) bool {
	for _, name := range fileNames(name) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		if st, err := os.Stat(name); err == nil && os.SameFile(st, base) {
			return true
		}
	}
	return false
}

// fileNames are the files that a backing file name may mean to QEMU: itself,
// without "file:" in front, or what a "json:" description names. (We do not
// follow the latter two, but who looks for children has to know them.)
func fileNames(name string) []string {
	if name == "" {
		return nil
	}
	names := []string{name}
	if rest, ok := strings.CutPrefix(name, "file:"); ok {
		names = append(names, rest)
	}
	rest, ok := strings.CutPrefix(name, "json:")
	var description any
	if !ok || json.Unmarshal([]byte(rest), &description) != nil {
		return names
	}
	for todo := []any{description}; len(todo) > 0; {
		last := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		object, _ := last.(map[string]any)
		for key, value := range object {
			text, ok := value.(string)
			if ok && (key == "filename" || strings.HasSuffix(key, ".filename")) {
				names = append(names, text)
			}
			todo = append(todo, value)
		}
	}
	return names
}

// backingName is the backing file that a qcow2 image names, "" if there is none
// or the file is no such image; known is false when the image cannot tell. What
// the image holds besides does not matter: of one that we cannot open, another
// program may need the base.
func backingName(path string) (name string, known bool) {
	f, err := backend.Open(path, backend.Options{})
	if err != nil {
		return "", true
	}
	defer f.Close()
	name, err = qcow2.BackingName(f)
	var bad *layers.ImageError
	return name, errors.Is(err, layers.ErrFormat) || !errors.As(err, &bad)
}

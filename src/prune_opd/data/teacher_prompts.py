"""What the teacher reads in front of a response, where it is not what the student read: a prompt with more in it,
another chat template, or another teacher for another kind of prompt.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from prune_opd.config import DataSection, TeacherSection
from prune_opd.data.columns import columns_text, lookup, named
from prune_opd.data.rendering import chat_of, may_fit, render, tokenize
from prune_opd.errors import ConfigError, DataError, MissingColumnError
from prune_opd.types import TeacherPrompt

SOURCE_COLUMN = "data_source"


@dataclass(frozen=True)
class Asked:
    """A prompt before it is written out. where: for messages · prompt: text or a chat · row: its columns ·
    as_it_is: it is all that a model sees, with no suffix and no chat template.
    """

    where: str
    prompt: Any
    row: Mapping[str, Any]
    answer: str | None
    as_it_is: bool = False


class TeacherView:
    """How prompts are written for the teacher, and for which one.

    teachers: of `model.teachers`, empty where there is one · chat_templates: of each teacher, None where it is the
    student's. The tokenizer is the student's: both give tokens the same ids. Raises ConfigError for a template that is
    no Jinja.
    """

    def __init__(
        self,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        teachers: Sequence[TeacherSection] = (),
        chat_templates: Sequence[str | None] = (None,),
    ) -> None:
        self.data, self.tokenizer, self.teachers, self.chat_templates = data, tokenizer, teachers, chat_templates
        self.longest = data.longest_for_teacher
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        try:
            self.template = data.teacher_prompt_template and environment.from_string(data.teacher_prompt_template)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"data.teacher_prompt_template = {data.teacher_prompt_template!r} is no Jinja template ({error}); "
                "write variables as {{ prompt }} and {{ answer }}"
            ) from None

    def prompts(self, asked: Sequence[Asked]) -> list[TeacherPrompt | None]:
        """What the teacher reads of each, None where that is too long.

        Raises DataError or MissingColumnError, which name file and line or row.
        """
        teachers = [self._teacher(one) for one in asked]
        found: dict[int, TeacherPrompt] = {}
        for teacher, chat_template in enumerate(self.chat_templates):
            own = [i for i, number in enumerate(teachers) if number == teacher]
            texts = [self._text(asked[i], chat_template) for i in own]
            fit = may_fit(texts, self.longest, self.tokenizer)
            ids = tokenize([texts[i] for i in fit], self.tokenizer, chat_template)
            read = {own[i]: tuple(one) for i, one in zip(fit, ids, strict=True)}
            found |= {i: TeacherPrompt(one, teacher) for i, one in read.items() if len(one) <= self.longest}
        return [found.get(i) for i in range(len(asked))]

    def _text(self, asked: Asked, chat_template: str | None) -> str:
        prompt = self._prompt(asked)
        return prompt if asked.as_it_is else render(asked.where, prompt, self.tokenizer, self.data, chat_template)

    def _prompt(self, asked: Asked) -> Any:
        if self.data.teacher_prompt_column:
            return named(asked.where, asked.row, self.data.teacher_prompt_column, "data.teacher_prompt_column")
        if not self.template:
            return asked.prompt
        chat = None if isinstance(asked.prompt, str) else chat_of(asked.where, asked.prompt)
        text = chat[-1]["content"] if chat else asked.prompt
        said = {**asked.row, "answer": asked.answer, "prompt": text}
        variables = {name: value for name, value in said.items() if value is not None}
        try:
            written = self.template.render(variables)
        except jinja2.UndefinedError as error:
            raise MissingColumnError(
                f"{asked.where}: data.teacher_prompt_template cannot be filled in: {error}. There are prompt, answer "
                f"where the row has a gold answer, and the columns that are not empty: {columns_text(variables)}"
            ) from None
        except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError) as error:
            raise DataError(
                f"{asked.where}: data.teacher_prompt_template cannot be filled in ({type(error).__name__}: {error}); "
                "change the template or the row"
            ) from None
        return [*chat[:-1], {"role": "user", "content": written}] if chat else written

    def _teacher(self, asked: Asked) -> int:
        if not self.teachers:
            return 0
        names, column = [teacher.name for teacher in self.teachers], self.data.teacher_column
        known, name = lookup(asked.row, column)
        if known and name is not None:
            if name in names:
                return names.index(name)
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "correct the row, or add the teacher"
            raise DataError(
                f"{asked.where}: column {column!r} names teacher {name!r}; model.teachers has {', '.join(names)}; "
                f"{hint}"
            )
        _, source = lookup(asked.row, SOURCE_COLUMN)
        for number, teacher in enumerate(self.teachers):
            if source in teacher.data_sources:
                return number
        raise MissingColumnError(
            f"{asked.where}: nothing says which teacher this prompt goes to: no column {column!r} "
            f"(data.teacher_column) with one of {', '.join(names)}"
            + (f", and none of model.teachers has {source!r} among its data_sources" if source is not None else "")
            + f"; there are: {columns_text(asked.row)}"
        )
